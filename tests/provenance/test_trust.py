"""Trust files and pins."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from flwr_clicooper.errors import StateError, TrustError
from flwr_clicooper.provenance.keys import MAX_FILE, Identity
from flwr_clicooper.provenance.trust import Party, Pins, Trust

HOSPITAL, ACME, BETA, STRANGER = (Identity.new().public for _ in range(4))

TEXT = f"""\
# agreed on in May
[[party]]
name = "hospital"
role = "owner"
key = "{HOSPITAL}"

[[party]]
name = "acme"
role = "trainer"
stage = 1
key = "{ACME}"

[[party]]
name = "beta"
role = "trainer"
key = "{BETA}"
"""


@pytest.fixture
def trust() -> Trust:
    return Trust.parse(TEXT)


def test_each_party_is_expected_where_it_is_listed(trust: Trust, tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(TEXT)
    assert Trust.load(path) == trust
    assert trust.expect("owner", 0, HOSPITAL) == "hospital"
    assert trust.expect("trainer", 1, ACME) == "acme"
    # Without a stage, a trainer may serve any, or wait as a standby.
    assert [trust.expect("trainer", stage, BETA) for stage in (0, 1, 7)] == ["beta"] * 3


@pytest.mark.parametrize(
    ("role", "stage", "key", "allowed"),
    [
        ("owner", 0, STRANGER, ["'hospital'", HOSPITAL.fingerprint]),
        ("owner", 0, ACME, ["'hospital'"]),
        ("trainer", 1, HOSPITAL, ["'acme'", "'beta'"]),
        ("trainer", 2, ACME, ["trainer 2; allowed is 'beta'"]),
        ("trainer", 0, ACME, ["allowed is 'beta'"]),
        ("relay", 0, HOSPITAL, ["as relay; allowed is nobody"]),
    ],
)
def test_no_other_key_is(trust: Trust, role: str, stage: int, key, allowed) -> None:
    with pytest.raises(TrustError, match="is not trusted as") as caught:
        trust.expect(role, stage, key)
    text = str(caught.value)
    assert key.fingerprint in text
    assert all(part in text for part in allowed)
    assert str(key) not in text


OTHER = f'name = "other"\nrole = "trainer"\nkey = "{STRANGER}"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[party]\n", "not TOML"),
        ("version = 1\n", "'version' is unknown"),
        ("party = 3\n", "not a list of tables"),
        ("[party]\nname = 'x'\n", "not a list of tables"),
        ("[[party]]\n" + OTHER + "since = 2024\n", "missing or unknown .'since'."),
        ("[[party]]\n" + OTHER.replace("role", "rolle"), "'role', 'rolle'"),
        ("[[party]]\n" + OTHER.replace("trainer", "boss"), "a role is one of owner, trainer"),
        ("[[party]]\n" + OTHER.replace('"other"', '""'), "0 characters"),
        ("[[party]]\n" + OTHER.replace("other", "o" * 65), "65 characters"),
        ("[[party]]\n" + OTHER.replace("other", "o\\n"), "not printable"),
        ("[[party]]\n" + OTHER.replace("other", "o\\u001b[2J"), "not printable"),
        ("[[party]]\n" + OTHER.replace("other", " o"), "without outer spaces"),
        ("[[party]]\n" + OTHER.replace('"other"', "7"), "not printable"),
        ("[[party]]\n" + OTHER + "stage = 0\n", "integer from 1"),
        ("[[party]]\n" + OTHER + "stage = -1\n", "integer from 1"),
        ("[[party]]\n" + OTHER + "stage = true\n", "integer from 1"),
        ("[[party]]\n" + OTHER + "stage = '1'\n", "integer from 1"),
        ("[[party]]\n" + OTHER.replace("trainer", "owner") + "stage = 1\n", "only a trainer"),
        ("[[party]]\n" + OTHER.replace("ed25519", "rsa"), "'other': a text is not a public"),
        ("[[party]]\n" + OTHER.replace(str(STRANGER), "x"), "'other': a text is not a public"),
        (TEXT + "[[party]]\n" + OTHER.replace("other", "acme"), "'acme' is listed more than"),
        (
            TEXT + "[[party]]\n" + OTHER.replace(str(STRANGER), str(ACME)),
            "key of party 'acme'",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(text)
    with pytest.raises(TrustError, match=message) as caught:
        Trust.load(path)
    assert str(path) in str(caught.value)


def test_the_file_that_the_wrong_ones_are_made_from_is_right() -> None:
    assert len(Trust.parse(TEXT + "[[party]]\n" + OTHER + "stage = 3\n").parties) == 4


@pytest.mark.parametrize("data", [None, b"\xff\xfe", b"#" * (MAX_FILE + 1)])
def test_an_unreadable_file_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "trust.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(TrustError, match="cannot be read"):
        Trust.load(path)
    if data is not None:
        with pytest.raises(TrustError, match="cannot be read"):
            Trust.add(path, Party("acme", "trainer", ACME))


def test_adding_keeps_what_is_there(tmp_path: Path) -> None:
    path, party = tmp_path / "trust.toml", Party('o"ther', "trainer", STRANGER, 2)
    path.write_text(TEXT)
    path.chmod(0o640)
    trust = Trust.add(path, party)
    assert path.read_text().startswith(TEXT)
    assert trust == Trust.load(path)
    assert trust.parties[3:] == (party,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["trust.toml"]


def test_adding_makes_a_file_that_all_may_read(tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    Trust.add(path, Party("hospital", "owner", HOSPITAL))
    Trust.add(path, Party("acme", "trainer", ACME))
    assert [p.name for p in Trust.load(path).parties] == ["hospital", "acme"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(TrustError, match="cannot be written"):
        Trust.add(tmp_path / "no folder" / "trust.toml", Party("acme", "trainer", ACME))


@pytest.mark.parametrize(
    ("text", "party", "message"),
    [
        (TEXT, Party("acme", "trainer", STRANGER), "nothing is added .* more than once"),
        (TEXT, Party("other", "owner", ACME), "nothing is added .* more than once"),
        ("party = []\n", Party("acme", "trainer", ACME), "nothing is added .* not TOML"),
        ("[[party]\n", Party("acme", "trainer", ACME), "not TOML"),
    ],
)
def test_what_cannot_be_added_changes_nothing(
    tmp_path: Path, text: str, party: Party, message: str
) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(text)
    with pytest.raises(TrustError, match=message):
        Trust.add(path, party)
    assert path.read_text() == text


# -- trust on first use --------------------------------------------------------------------


def test_the_first_key_is_pinned_per_place(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "pins"
    assert Pins(folder).check("owner", 0, HOSPITAL) is True
    assert Pins(folder).check("trainer", 1, ACME) is True
    assert Pins(folder).check("trainer", 2, BETA) is True
    for role, stage, key in (("owner", 0, HOSPITAL), ("trainer", 1, ACME)):
        assert Pins(folder).check(role, stage, key) is False
    assert stat.S_IMODE((folder / "pins.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_key_is_refused_and_does_not_replace_the_first(tmp_path: Path) -> None:
    pins = Pins(tmp_path)
    pins.check("trainer", 1, ACME)
    for _ in range(2):
        with pytest.raises(TrustError, match="seen first as trainer 1; allowed is") as caught:
            pins.check("trainer", 1, STRANGER)
        assert STRANGER.fingerprint in str(caught.value)
        assert ACME.fingerprint in str(caught.value)
    assert pins.check("trainer", 1, ACME) is False


@pytest.mark.parametrize(
    "text", ["", "[]", '{"owner": 3}', '{"owner": "ed25519:x"}', "[" * 5000, '{"owner": "e']
)
def test_damaged_pins_do_not_start_again(tmp_path: Path, text: str) -> None:
    pins = Pins(tmp_path)
    pins.check("owner", 0, HOSPITAL)
    (tmp_path / "pins.json").write_text(text)
    with pytest.raises(StateError, match="are damaged"):
        pins.check("owner", 0, STRANGER)
    assert (tmp_path / "pins.json").read_text() == text


def test_pins_that_others_may_write_are_refused(tmp_path: Path) -> None:
    pins = Pins(tmp_path)
    pins.check("owner", 0, HOSPITAL)
    (tmp_path / "pins.json").chmod(0o660)
    with pytest.raises(StateError, match="others may read the pinned keys"):
        pins.check("owner", 0, HOSPITAL)


def test_pins_that_cannot_be_kept_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot be written"):
        Pins(tmp_path / "file").check("owner", 0, HOSPITAL)
