"""What of a flood a process sends on: bounded, counted, and the last lines always."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nbray.flow import HELD, MESSAGE_BYTES, TAIL, Bucket, Feed
from nbray.messages import Output


def said(task: bytes, text: str) -> Output:
    return Output(task, "stdout", text, "f", 0, "cell")


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(1, 200)), max_size=60))
def test_a_bucket_gives_no_more_than_it_has(steps: list[tuple[float, float]]) -> None:
    bucket, now, taken = Bucket(10.0, 50.0), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        if amount <= 50.0 and bucket.take(now, amount):
            taken += amount
        assert taken <= 50.0 + 10.0 * now + 1e-6
    wait = bucket.wait(now, 50.0)
    assert bucket.take(now + wait + 1e-6, 50.0)


def test_little_goes_on_as_it_is() -> None:
    feed = Feed()
    message = said(b"a", "hello\n")
    assert feed.text(0.0, message) == [message]
    assert feed.ended(0.0, b"a") == []


def test_a_flood_is_cut_and_its_end_sent_with_the_count() -> None:
    feed = Feed()
    sent: list[Output] = []
    for number in range(1000):
        sent += feed.text(0.0, said(b"a", f"{number} " + "x" * 10_000 + "\n"))
    sent += feed.text(0.0, said(b"a", "the end\n"))
    last = feed.ended(0.0, b"a")
    assert last[-1].text.endswith("the end\n")
    assert last[-1].end
    lines = sum(message.text.count("\n") for message in (*sent, *last))
    assert lines + sum(message.skipped for message in (*sent, *last)) == 1001
    assert sum(len(message.text) for message in last) <= 2 * TAIL
    assert not feed.held


def test_there_is_room_again_after_a_while() -> None:
    feed = Feed()
    while feed.text(0.0, said(b"a", "x" * 10_000)):
        pass
    feed.bucket.level = 0.0
    assert feed.tick(0.0) == []
    (message,) = feed.tick(10.0)
    assert message.text.endswith("x")
    assert not message.end
    later = said(b"a", "later\n")
    assert feed.text(10.0, later) == [later]


def test_of_very_many_tasks_the_number_is_kept() -> None:
    feed = Feed()
    feed.bucket.level = feed.ends.level = 0.0
    for number in range(3 * HELD):
        assert feed.text(0.0, said(b"%d" % number, "one\ntwo\n")) == []
        assert feed.ended(0.0, b"%d" % number) == []
    assert len(feed.held) == HELD
    messages = [message for second in range(1000) for message in feed.tick(float(second))]
    assert sum(message.tasks for message in messages) + len(messages) == 3 * HELD
    assert sum(message.skipped + message.text.count("\n") for message in messages) == 6 * HELD


texts = st.tuples(
    st.integers(0, 3),
    st.integers(0, 3000),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.0, 0.01, 1.0]),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(texts, max_size=80))
def test_every_line_is_sent_or_counted_and_ends_are_sent(
    steps: list[tuple[int, int, int, float, bool]],
) -> None:
    feed = Feed()
    sent: list[Output] = []
    now, written, size = 0.0, 0, 0.0
    last: dict[bytes, str] = {}
    for task, width, count, pause, ends in steps:
        name = b"%d" % task
        text = "".join(f"{written + i}" + "x" * width + "\n" for i in range(count))
        written += count
        if text:
            last[name] = text[-20:]
            new = feed.text(now, said(name, text))
            sent += new
        if ends:
            sent += feed.ended(now, name)
        now += pause
        sent += feed.tick(now)
    for second in range(1, 200):
        sent += feed.tick(now + second)
    size = sum(len(message.text) + MESSAGE_BYTES for message in sent)
    assert sum(message.text.count("\n") + message.skipped for message in sent) == written
    assert size <= 2 * (1024 + 512) * 1024 + 512 * 1024 * (now + 200)
    for name, text in last.items():
        mine = [message.text for message in sent if message.task == name]
        assert "".join(mine).endswith(text[-min(20, len(text)) :])
