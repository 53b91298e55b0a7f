"""Losses on captioners. Every file defines `Config` and `Objective` (see `trainer.objective`)."""
