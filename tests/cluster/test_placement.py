"""The arithmetic of bundles, and placement groups of a real session."""

import logging

import pytest

from cluster.bundles import bundle_of, spoken_bundle
from cluster.placement import OwnPlacementGroup


def test_a_bundle_leaves_out_what_is_not_needed_and_is_spoken():
    assert bundle_of(2, 0) == {"CPU": 2.0}
    assert bundle_of(0, 0.5) == {"GPU": 0.5}
    assert spoken_bundle(bundle_of(2, 0.5)) == "2 CPUs and 0.5 GPU"
    assert spoken_bundle(bundle_of(1)) == "1 CPU"


@pytest.mark.parametrize("labels", [{}, {"pool": "a"}])
def test_what_is_asked_of_ray_is_what_ray_takes(monkeypatch, labels):
    from ray.util.placement_group import validate_placement_group

    def check(bundles, strategy, name, bundle_label_selector):
        validate_placement_group(bundles=bundles, strategy=strategy, bundle_label_selector=bundle_label_selector)
        return bundle_label_selector

    monkeypatch.setattr("cluster.placement.placement_group", check)
    assert OwnPlacementGroup(bundle_of(1), labels).reserve("w0") == ([labels] if labels else None)
    with pytest.raises(ValueError, match="length"):
        check([{"CPU": 1.0}], "PACK", "w0", [])


@pytest.mark.slow
def test_room_is_had_up_to_what_there_is_and_given_back():
    import ray

    from cluster.session import session

    with session(None, cpus=2):
        logging.getLogger("ray").setLevel(logging.ERROR)
        placement = OwnPlacementGroup(bundle_of(1))
        rooms = [placement.reserve(f"w{number}") for number in range(3)]
        assert [placement.wait(room, 30.0) for room in rooms[:2]] == [True, True]
        assert not placement.wait(rooms[2], 1.0)
        placement.release(rooms[0])
        assert placement.wait(rooms[2], 30.0)

        @ray.remote(num_cpus=1)
        class Worker:
            def room(self) -> str:
                group = ray.util.get_current_placement_group()
                return "" if group is None else group.id.hex()

        worker = Worker.options(**placement.options(rooms[2])).remote()
        assert ray.get(worker.room.remote(), timeout=60) == rooms[2].id.hex()
