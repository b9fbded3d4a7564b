"""What is kept of responses: both bounds, whose is dropped first, and that nobody sees another's."""

import pytest

from server.response_store import ResponseStore, StoredResponse


def response(name: str, *, num_bytes: int = 10) -> StoredResponse:
    """A response of this size, with one item of input and one of output."""
    return StoredResponse(id=name, body=b"x" * (num_bytes - 4), input=(b"in",), output={f"item-of-{name}": b"ou"})


def store_of(*names: str, max_responses: int = 100, max_bytes: int = 1000) -> ResponseStore:
    store = ResponseStore(max_responses=max_responses, max_bytes=max_bytes)
    for name in names:
        store.put(response(name), tenant="")
    return store


def kept(store: ResponseStore, *names: str, tenant: str = "") -> list[str]:
    return [name for name in names if store.get(name, tenant=tenant) is not None]


def test_a_response_is_kept_with_the_conversation_it_ends():
    store = store_of("a")

    found = store.get("a", tenant="")

    assert found is not None
    assert found.items == (b"in", b"ou")
    assert store.output_item("item-of-a", tenant="") == b"ou"
    assert (store.num_responses, store.num_bytes) == (1, 10)


def test_as_many_responses_as_the_cap_are_kept_and_one_more_drops_the_oldest():
    store = store_of("a", "b", "c", max_responses=3)
    assert kept(store, "a", "b", "c") == ["a", "b", "c"]

    store.put(response("d"), tenant="")

    assert kept(store, "a", "b", "c", "d") == ["b", "c", "d"]


def test_as_many_bytes_as_the_cap_are_kept_and_one_more_drops_the_oldest():
    store = store_of("a", "b", max_bytes=30)
    store.put(response("c", num_bytes=10), tenant="")
    assert kept(store, "a", "b", "c") == ["a", "b", "c"]

    store.put(response("d", num_bytes=11), tenant="")

    assert kept(store, "a", "b", "c", "d") == ["c", "d"]
    assert store.num_bytes == 21


def test_what_was_asked_for_last_stays_the_longest():
    store = store_of("a", "b", "c", max_responses=3)
    store.get("a", tenant="")
    store.output_item("item-of-b", tenant="")

    store.put(response("d"), tenant="")

    assert kept(store, "a", "b", "c", "d") == ["a", "b", "d"]


def test_a_response_as_large_as_the_store_is_kept_and_a_larger_one_costs_nobody_anything():
    store = store_of("a", max_bytes=100)

    store.put(response("huge", num_bytes=101), tenant="")
    assert kept(store, "a", "huge") == ["a"]

    store.put(response("large", num_bytes=100), tenant="")
    assert kept(store, "a", "large") == ["large"]


@pytest.mark.parametrize("caps", [{"max_responses": 0}, {"max_bytes": 0}], ids=str)
def test_a_store_without_room_keeps_nothing(caps: dict[str, int]):
    store = store_of("a", **caps)

    assert kept(store, "a") == []
    assert (store.num_responses, store.num_bytes) == (0, 0)


def test_nobody_sees_or_deletes_what_belongs_to_another():
    store = ResponseStore(max_responses=10, max_bytes=1000)
    store.put(response("a"), tenant="alice")

    assert store.get("a", tenant="bob") is None
    assert store.output_item("item-of-a", tenant="bob") is None
    assert not store.delete("a", tenant="bob")
    assert store.get("a", tenant="alice") is not None


def test_a_tenant_that_stores_a_lot_pushes_out_its_own():
    store = ResponseStore(max_responses=3, max_bytes=1000)
    store.put(response("a"), tenant="alice")
    for name in ("b", "c", "d", "e"):
        store.put(response(name), tenant="bob")

    assert kept(store, "a", tenant="alice") == ["a"]
    assert kept(store, "b", "c", "d", "e", tenant="bob") == ["d", "e"]


def test_what_is_deleted_leaves_nothing_behind():
    store = store_of("a")

    assert store.delete("a", tenant="")

    assert store.output_item("item-of-a", tenant="") is None
    assert not store.delete("a", tenant="")
    assert (store.num_responses, store.num_bytes) == (0, 0)
