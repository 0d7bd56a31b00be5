"""A method that was replaced on an object comes back as what it was, however often it was replaced."""

from videogen.models.replaced import give_back


class Owner:
    def run(self) -> str:
        return "plain"


def test_what_was_there_comes_back():
    owner = Owner()
    plain = owner.run
    owner.run = first = lambda: "first"  # type: ignore[method-assign]
    owner.run = lambda: "second"  # type: ignore[method-assign]
    give_back(owner, "run", first)
    assert owner.run() == "first"
    give_back(owner, "run", plain)
    assert owner.run() == "plain"
    assert not vars(owner)
