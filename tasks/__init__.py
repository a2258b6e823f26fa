"""The Prefect tasks of the flows, and the modules that talk to Dask."""
