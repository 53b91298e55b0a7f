"""The order in which images are taken, against what fairness means."""

import random
from dataclasses import dataclass

import pytest

from serving.caller import Caller, calling
from serving.errors import QueueFull
from serving.fair_queue import FairQueue
from serving.limits import Budget


@dataclass(eq=False)
class Image:
    caller_name: str
    number: int = 0
    rows: int = 1


def queue_of(*images):
    queue = FairQueue()
    for image in images:
        queue.append(image)
    return queue


def take_one(queue):
    taken = []

    def wanted(image):
        taken.append(image)
        return len(taken) == 1

    queue.take(wanted)
    return taken[0]


def drained(queue):
    found = []
    while len(queue):
        foretold = queue.first()
        found.append(take_one(queue))
        assert foretold is found[-1]
    return found


def test_one_caller_s_images_leave_in_the_order_they_came():
    images = [Image("", number, rows=1 + number % 4) for number in range(50)]
    assert drained(queue_of(*images)) == images


def test_a_flood_delays_a_single_image_by_one_turn():
    flood = [Image("flood", number) for number in range(200)]
    queue = queue_of(*flood)
    for _ in range(20):
        take_one(queue)
    lone = Image("lone")
    queue.append(lone)
    assert lone in [take_one(queue), take_one(queue)]


def test_all_who_have_enough_get_as_many_rows():
    queue = FairQueue()
    for number in range(300):
        for name, rows in (("one", 1), ("four", 4), ("sixteen", 16)):
            queue.append(Image(name, number, rows))
    given = dict.fromkeys(("one", "four", "sixteen"), 0)
    for _ in range(300):
        image = take_one(queue)
        given[image.caller_name] += image.rows
        assert max(given.values()) - min(given.values()) <= 16
    assert min(given.values()) > 200


def test_who_was_away_has_saved_up_nothing():
    queue = queue_of(*[Image("a", number) for number in range(100)], Image("b"))
    for _ in range(51):
        take_one(queue)
    for number in range(50):
        queue.append(Image("b", number))
    names = [take_one(queue).caller_name for _ in range(20)]
    assert 9 <= names.count("a") <= 11


def test_who_cancels_pays_nothing():
    cancelled = [Image("b", number, rows=16) for number in range(20)]
    queue = queue_of(Image("a"), *cancelled, *[Image("a", number) for number in range(20)])
    for image in cancelled:
        queue.remove(image)
    queue.append(Image("b", 1))
    names = [take_one(queue).caller_name for _ in range(3)]
    assert "b" in names


def test_one_who_sends_again_as_soon_as_it_is_served_gets_no_more():
    queue = queue_of(*[Image("steady", number) for number in range(100)], Image("quick"))
    names = []
    for _ in range(60):
        image = take_one(queue)
        names.append(image.caller_name)
        if image.caller_name == "quick":
            queue.append(Image("quick"))
    assert 29 <= names.count("quick") <= 31


def test_what_is_not_wanted_keeps_its_place():
    images = [Image("a", 0), Image("a", 1), Image("b", 2), Image("a", 3), Image("b", 4)]
    queue = queue_of(*images)
    taken = queue.take(lambda image: image.number in (1, 4))
    assert [image.number for image in taken] == [1, 4]
    assert len(queue) == 3
    assert sorted(image.number for image in drained(queue)) == [0, 2, 3]


def test_a_full_queue_makes_room_at_the_cost_of_the_longest_line():
    flood = [Image("flood", number) for number in range(10)]
    queue = queue_of(*flood, Image("small"))
    assert queue.make_room(Image("flood")) is None
    assert queue.make_room(Image("lone")) is flood[-1]
    assert queue.make_room(Image("small")) is flood[-2]
    assert len(queue) == 9
    assert queue_of(Image("", 1), Image("", 2)).make_room(Image("")) is None
    assert queue_of(Image("a"), Image("b")).make_room(Image("c")) is None


def test_nothing_is_lost_and_nothing_is_kept_whatever_happens():
    chance = random.Random(5)
    queue, inside = FairQueue(), set()
    for number in range(3000):
        match chance.choice("aaartm"):
            case "a":
                image = Image(chance.choice("abcd"), number, chance.choice((1, 4, 16)))
                queue.append(image)
                inside.add(image)
            case "r" if inside:
                gone = chance.choice(sorted(inside, key=lambda image: image.number))
                queue.remove(gone)
                queue.remove(gone)  # the second time it is not there
                inside.remove(gone)
            case "t":
                taken = queue.take(lambda _: chance.random() < 0.3)
                assert inside.issuperset(taken)
                inside.difference_update(taken)
            case "m" if inside:
                gone = queue.make_room(Image("e"))
                inside.discard(gone)
        assert len(queue) == len(inside)
    assert set(drained(queue)) == inside
    queue.take(lambda _: True)
    assert (queue._lines, queue._given, queue._now) == ({}, {}, 0.0)


def test_one_key_takes_half_of_a_budget_at_most_and_others_find_room():
    budget = Budget(100, "no room")
    with calling(Caller("flood")), budget.share() as flood:
        for _ in range(50):
            flood(1)
        with pytest.raises(QueueFull):
            flood(1)
        with calling(Caller("lone")), budget.share() as lone:
            lone(25)
            with pytest.raises(QueueFull):
                lone(1)
            with calling(Caller("third")), budget.share() as third:
                third(12)
        with calling(Caller()), budget.share() as nobody:  # without keys there is no share
            nobody(50)
    assert budget.held == 0
    assert budget._held_by == {}
