import json
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen


def run_bill(base_url: str, token: str, run_id: str, calls: int, wait_seconds: int = 10) -> dict[str, Any]:
    """The run's bill as soon as all its calls are settled (`complete`), else as it is after `wait_seconds`."""
    url = f"{base_url}/v1/runs/{quote(run_id, safe='')}?calls={calls}&wait_seconds={wait_seconds}"
    request = Request(url, headers={"Authorization": f"Bearer {token}"})
    with urlopen(request, timeout=wait_seconds + 5) as answer:
        bill: dict[str, Any] = json.load(answer)
    return bill
