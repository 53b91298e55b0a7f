"""Lets every test import the modules of this folder: `histories`, `chromium`."""
