"""The tree that errors.py draws is the tree that there is."""

import re

from serving import errors, request
from serving.errors import CaptionError
from serving.problem import problem
from serving.schema import Problem


def kinds(root=CaptionError):
    for kind in root.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_the_tree_is_complete():
    drawn = re.findall(r"^ \+- (\w+) +(\d+)", errors.__doc__, re.MULTILINE)
    assert dict(drawn) == {kind.__name__: str(kind.status) for kind in kinds()}
    assert {kind.__module__ for kind in kinds()} == {errors.__name__}
    assert not issubclass(request.ClientGone, CaptionError)  # nobody is left to hear of it


def test_the_documented_type_is_one_that_occurs():
    [example] = Problem.model_fields["type"].examples
    undecodable = problem(errors.UndecodableImage("damaged"), "1")
    assert f'"type":"{example}"' in undecodable.body.decode()
