"""Places are chosen as different as there are, and always the same ones."""

from collections import Counter

from mutation.sampling import Key, Sample, cost_of
from mutation.toys import TOYS

PLACES = {Key(f"kind {n}"): {toy: [(n, 0), (n, 1)] for toy in TOYS} for n in range(250)}


def taken(count, seed=0, places=PLACES):
    sample = Sample(places, seed)
    return sample.take(dict.fromkeys(sample.keys, count))


def test_three_places_of_a_kind_differ_in_architecture_precision_and_form():
    by_kind = {}
    for key, (toy, _) in taken(3):
        by_kind.setdefault(key, []).append(toy)

    for toys in by_kind.values():
        assert len({toy.architecture for toy in toys}) == 3
        assert len({toy.precision for toy in toys}) == 3
        assert len({toy.shape for toy in toys}) > 1


def test_all_artifacts_have_mistakes_the_cheap_ones_more():
    count = Counter(toy for _, (toy, _) in taken(3))

    assert set(count) == set(TOYS)
    dearest, cheapest = max(TOYS, key=cost_of), min(TOYS, key=cost_of)
    assert count[cheapest] > count[dearest]


def test_the_choice_depends_on_the_seed_alone():
    assert taken(3) == taken(3)
    assert taken(3) != taken(3, seed=1)
    backwards = {key: dict(reversed(where.items())) for key, where in PLACES.items()}
    assert taken(3) == taken(3, places=backwards)


def test_no_place_is_taken_twice_and_no_more_than_there_are():
    places = {Key("rare"): {TOYS[0]: [(1,), (2,)], TOYS[1]: [(1,)]}}
    sample = Sample(places, 0)

    first = sample.take({Key("rare"): 2})
    rest = sample.take({Key("rare"): 5})

    assert len(first) == 2
    assert len({toy for _, (toy, _) in first}) == 2
    assert len(rest) == 1
    assert len({*first, *rest}) == 3
