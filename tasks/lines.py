"""How often a run speaks where there is no terminal, and how many failures it tells before it refers to the table."""

LINE_SECONDS = 5.0
SHOWN_FAILURES = 20
