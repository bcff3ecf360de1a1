"""Passwords are hashed by Argon2id, and a name without one costs as much as a wrong one."""

import asyncio
import time

import pytest
from argon2 import PasswordHasher
from argon2.profiles import RFC_9106_LOW_MEMORY

from claude_hitl_template.config import passwords
from claude_hitl_template.config.passwords import Passwords
from claude_hitl_template.errors import InvalidInput, RateLimited

CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture
def ours() -> Passwords:
    return Passwords(CHEAP)


async def test_a_password_fits_its_hash_only(ours: Passwords) -> None:
    stored = await ours.hash("correct horse battery")
    assert "correct" not in stored
    assert await ours.verify(stored, "correct horse battery")
    assert not await ours.verify(stored, "correct horse batterY")
    assert stored != await ours.hash("correct horse battery")


async def test_the_parameters_are_the_librarys() -> None:
    stored = await Passwords().hash("correct horse battery")
    assert stored.startswith("$argon2id$")
    low = RFC_9106_LOW_MEMORY
    assert f"m={low.memory_cost},t={low.time_cost},p={low.parallelism}" in stored


@pytest.mark.parametrize("stored", [None, "", "not a hash", "$argon2id$v=19$m=8,t=1,p=1$x$y"])
async def test_nothing_fits_no_hash(ours: Passwords, stored: str | None) -> None:
    assert not await ours.verify(stored, "")
    assert not await ours.verify(stored, "correct horse battery")


async def test_a_name_without_a_password_takes_as_long(ours: Passwords) -> None:
    real = Passwords()
    stored = await real.hash("correct horse battery")

    async def seconds(of: str | None) -> float:
        began = time.process_time()
        await real.verify(of, "wrong")
        return time.process_time() - began

    with_one, without = await seconds(stored), await seconds(None)
    assert 0.3 < with_one / without < 3


@pytest.mark.parametrize("password", ["", "short", "x" * 11, "x" * 1025])
async def test_a_password_of_another_length_is_refused_by_name(ours: Passwords, password: str) -> None:
    with pytest.raises(InvalidInput, match="12 to 1024 characters") as refused:
        await ours.hash(password)
    assert refused.value.field == "password"


async def test_one_character_is_the_same_however_it_is_composed(ours: Passwords) -> None:
    stored = await ours.hash("pässwörter sind lang")
    assert await ours.verify(stored, "pa\u0308sswo\u0308rter sind lang")
    assert not await ours.verify(stored, "passw\udcffrter sind lang")


async def test_too_many_at_once_are_sent_away(ours: Passwords) -> None:
    many = [asyncio.create_task(ours.verify(None, "wrong")) for _ in range(passwords.WAITING + 5)]
    done = await asyncio.gather(*many, return_exceptions=True)
    assert sum(isinstance(one, RateLimited) for one in done) == 5
    assert not await ours.verify(None, "wrong")
