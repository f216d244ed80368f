"""Known vulnerabilities of everything in the locks, by pip-audit, in a venv of its own."""
