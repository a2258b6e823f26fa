"""`desra serve`: the Prefect server and its worker, the schedules, and the processes of both."""
