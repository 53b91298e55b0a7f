"""Runs the server under Ray like `python -m serving up`, with as many replicas as are asked for."""

import sys

import serving.deployment as deployment
from serving.settings import Settings

one = deployment.build


def several(settings: Settings):
    bound = one(settings)._bound_deployment
    return bound.options(num_replicas=int(sys.argv[1])).bind(settings)


deployment.build = several
deployment.up(Settings(port=int(sys.argv[3])))
