"""The Prefect tasks over one shard, and the one place that talks to Dask."""
