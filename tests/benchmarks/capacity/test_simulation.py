"""The simulation against what theory says of queues that it has formulas for."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from benchmarks.capacity.planning import Choice, fewest
from benchmarks.capacity.simulation import Outcome, Routing, Service, Setting, simulate

REQUESTS = 200_000
ONE_BY_ONE = Service({1: (1.0,)}, exponential=True)


def setting(rate: float, replicas: int = 1, service: Service = ONE_BY_ONE, **more: object) -> Setting:
    options = {"queue": None, "batch_wait_s": 0.0, "routing": Routing.ONE_QUEUE} | more
    return Setting(rate, replicas, service, **options)  # type: ignore[arg-type]  # options of any kind


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_one_server_with_exponential_service(rate: float):
    """M/M/1: the time in the system is exponential with rate 1 - λ."""
    outcome = simulate(setting(rate), REQUESTS)
    assert fmean(outcome.seconds) == pytest.approx(1 / (1 - rate), rel=0.06)
    assert outcome.quantile(0.99) == pytest.approx(math.log(100) / (1 - rate), rel=0.1)
    assert outcome.busy_s / outcome.lasted_s == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_one_server_with_service_of_one_length(rate: float):
    """M/D/1: half the wait of M/M/1, by Pollaczek and Khinchine."""
    outcome = simulate(setting(rate, service=Service({1: (1.0,)})), REQUESTS)
    assert fmean(outcome.seconds) == pytest.approx(1 + rate / (2 * (1 - rate)), rel=0.03)


def erlang_c(servers: int, load: float) -> float:
    """The share of requests that wait at all: M/M/c."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize("servers", [2, 8])
def test_several_servers_of_one_queue(servers: int):
    """M/M/c: the mean wait, by Erlang's formula."""
    load = 0.8 * servers
    outcome = simulate(setting(load, servers), REQUESTS)
    wait = erlang_c(servers, load) / (servers - load)
    assert fmean(outcome.seconds) - 1 == pytest.approx(wait, rel=0.08)


def test_a_queue_of_so_many_places_refuses_as_erlang_says():
    """M/M/1/K: with 2 who wait and one who is drawn, K is 3."""
    rate, places = 0.9, 3
    outcome = simulate(setting(rate, queue=places - 1), REQUESTS)
    refused = (1 - rate) * rate**places / (1 - rate ** (places + 1))
    assert outcome.refused_share == pytest.approx(refused, rel=0.05)


def test_two_choices_are_worse_than_one_queue_and_far_better_than_chance():
    """Separate queues chosen by chance would each be M/M/1."""
    load, servers = 0.9, 10
    one = fmean(simulate(setting(load * servers, servers), REQUESTS).seconds)
    two = fmean(simulate(setting(load * servers, servers, routing=Routing.TWO_CHOICES), REQUESTS).seconds)
    by_chance = 1 / (1 - load)
    assert one < two < by_chance / 2


def test_passes_are_shared_under_load_only():
    service = Service({1: (1.0,), 2: (1.2,), 4: (1.6,)})
    assert service.images_per_s == 2.5
    calm = simulate(setting(0.05, service=service), 5_000)
    full = simulate(setting(2.4, service=service), 20_000)
    assert calm.images / calm.passes < 1.1
    assert full.images / full.passes > 3.5
    assert full.busy_s / full.lasted_s <= 1.001


def test_whoever_is_first_waits_for_company():
    service = Service({1: (0.001,), 2: (0.001,)})
    outcome = simulate(setting(0.001, service=service, batch_wait_s=0.5), 200)
    assert outcome.quantile(0.5) == pytest.approx(0.501)


def test_the_fewest_replicas_are_those_of_which_one_less_is_too_few():
    service = Service({1: (1.0,), 4: (2.0,)})
    asked = Setting(20.0, 1, service)
    found = fewest(asked, 4.0)
    assert found is not None
    assert found.suits(4.0)
    less = simulate(Setting(20.0, found.replicas - 1, service), 40_000)
    assert not Choice(found.replicas - 1, less).suits(4.0)
    assert fewest(asked, 0.5) is None, "an image alone takes longer"


def test_the_search_sees_few_numbers():
    seen: list[int] = []

    def see(_setting: Setting, replicas: int) -> Choice:
        seen.append(replicas)
        return Choice(replicas, Outcome(seconds=[1.0 if replicas >= 137 else 9.0]))

    found = fewest(setting(100.0), 4.0, see)
    assert found is not None
    assert found.replicas == 137
    assert len(seen) < 20
