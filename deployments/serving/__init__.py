"""`desra serve`: the Prefect server, its worker, schedules, and whose processes they are."""
