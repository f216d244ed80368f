// Refreshes the numbers, where somebody asks for it. The pages work without it.
"use strict";

const SECONDS = 10;
const box = document.getElementById("refresh");

async function refresh() {
  if (document.hidden) return;
  const label = box.closest("label");
  try {
    const answer = await fetch(location.href, { redirect: "error" });
    label.toggleAttribute("data-failed", !answer.ok);
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const old of document.querySelectorAll("[data-live]")) {
      const found = fresh.getElementById(old.id);
      if (!found || old.contains(document.activeElement)) continue; // not under somebody's hands
      for (const open of old.querySelectorAll("details[open][id]")) {
        found.querySelector("#" + open.id)?.setAttribute("open", "");
      }
      old.replaceWith(document.adoptNode(found));
    }
  } catch {
    label.toggleAttribute("data-failed", true); // the next time, perhaps
  }
}

if (box) {
  let timer;
  const start = () => {
    clearInterval(timer);
    if (box.checked) timer = setInterval(refresh, SECONDS * 1000);
    sessionStorage.setItem("refresh", box.checked ? "yes" : "");
  };
  box.checked = sessionStorage.getItem("refresh") === "yes";
  box.closest("[hidden]").hidden = false;
  box.addEventListener("change", start);
  start();
}
