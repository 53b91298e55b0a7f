"""The verbs of `python -m trainer`. Every file defines `Config` and `run(config, out_dir)`."""
