"""The science of DeSRA: plain functions on arrays and files. Knows neither Prefect nor Dask."""

__version__ = "0.1.0"
