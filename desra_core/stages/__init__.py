"""The stages of detection and mining: Dask calls one small function per stage and image.

A stage takes an image, its record so far, the workspace and the job of the run, commits its files and returns the new
record. It may be run again at any time, by another process too, and then leaves the same files.
"""

from desra_core.stages.run import Stage, StageJob, failure, run_stage

__all__ = ["Stage", "StageJob", "failure", "run_stage"]
