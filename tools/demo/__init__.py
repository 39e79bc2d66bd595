"""The recipe of the embedded pipeline: its images, its training, its checks. Run it by `python -m tools.demo`."""
