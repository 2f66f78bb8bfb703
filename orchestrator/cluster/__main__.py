"""`python -m orchestrator.cluster`, and `outrider controller`."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.planner.drafter_choice import Prices
from orchestrator.scaling.drafters import DrafterGoals
from orchestrator.scaling.pacing import Limits
from orchestrator.scaling.policy import DEFAULT_LIMITS, PolicyConfig
from orchestrator.scaling.signals import FleetName
from orchestrator.scaling.verifiers import VerifierGoals
from outrider.errors import ConfigError
from outrider.serving.loops import run
from outrider.serving.options import service_options

F = TypeVar("F", bound=Callable[..., Any])
_KINDS = {
    FleetName.ORCHESTRATORS: "deployment/outrider-orchestrator",
    FleetName.VERIFIERS: "statefulset/outrider-verifier",
    FleetName.DRAFTERS: "deployment/outrider-drafter",
}
_POLICY = PolicyConfig()
_LIMITS = DEFAULT_LIMITS[FleetName.VERIFIERS]
_FILE = click.Path(path_type=Path, dir_okay=False)
_SHARE = click.FloatRange(min=0, max=1, min_open=True)


def _fleet_options(command: F) -> F:
    """Add what is said of each fleet."""
    for fleet, workload in reversed(_KINDS.items()):
        limits = DEFAULT_LIMITS[fleet]
        name = fleet.value
        for option in (
            click.option(
                f"--{name}-ceiling",
                type=click.IntRange(min=0),
                default=limits.ceiling,
                show_default=True,
                help=f"Most {name}.",
            ),
            click.option(
                f"--{name}-floor",
                type=click.IntRange(min=0),
                default=limits.floor,
                show_default=True,
                help=f"Fewest {name}.",
            ),
            click.option(
                f"--{name}",
                default=workload,
                show_default=True,
                help=f"What to scale; '' leaves the {name} alone.",
            ),
        ):
            command = option(command)
    return command


@click.command("controller", context_settings={"auto_envvar_prefix": "OUTRIDER_CONTROLLER"})
@click.option(
    "--discover",
    "discover",
    default="kubernetes:outrider",
    show_default=True,
    help="Where orchestrators are: kubernetes:NAMESPACE, or kubernetes:NAMESPACE/SELECTOR.",
)
@_fleet_options
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.5),
    default=15.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--stale-after",
    "stale_after_s",
    type=click.FloatRange(min=1),
    default=_POLICY.stale_after_s,
    show_default=True,
    help="Seconds after which what was measured changes nothing any more.",
)
@click.option(
    "--shrink-after",
    "shrink_after_s",
    type=click.FloatRange(min=0),
    default=_LIMITS.down_window_s,
    show_default=True,
    help="Seconds for which less must be wanted before a fleet shrinks.",
)
@click.option(
    "--queue-wait-goal",
    "queue_wait_goal_s",
    type=click.FloatRange(min=0, min_open=True),
    default=_POLICY.verifiers.queue_wait_s,
    show_default=True,
    help="Seconds within which 95% of the sessions shall be taken by a verifier.",
)
@click.option(
    "--kv-goal",
    type=_SHARE,
    default=_POLICY.verifiers.kv_share,
    show_default=True,
    help="Share of the verifiers' KV that may be in use; above it they become more.",
)
@click.option(
    "--occupancy-goal",
    type=_SHARE,
    default=_POLICY.verifiers.occupancy,
    show_default=True,
    help="Likewise of the sessions that they take.",
)
@click.option("--verifier-price", type=click.FloatRange(min=0), help="Per hour, any currency.")
@click.option("--drafter-price", type=click.FloatRange(min=0), help="Per hour, same currency.")
@click.option(
    "--step-nodes-max",
    type=click.IntRange(min=1),
    default=_POLICY.drafters.step_nodes_max,
    show_default=True,
    help="As the verifiers have it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and why; write nothing.")
@click.option("--name", help="Of this replica, such as its pod's.  [default: random]")
@click.option(
    "--lease", default="outrider-controller", show_default=True, help="Name of the Lease."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Serve probes and metrics.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8081,
    show_default=True,
    help="Of these; 0 picks a free one.",
)
@click.option("--metrics-key", type=_FILE, help="File with an API key of the orchestrators.")
@click.option("--metrics-ca", type=_FILE, help="Authority of their HTTPS certificates; PEM.")
@click.option("--metrics-server-name", help="Name in those certificates.")
@service_options("controller", traces=False)
def command(**options: Any) -> None:
    """Size the fleets on Kubernetes by what is measured; of several replicas one leads.

    Asks all orchestrators for their metrics, and sets how many replicas each fleet has: verifiers
    by occupancy, KV and waiting, drafters by what they win for what they cost, orchestrators by
    sessions, connections and processor time.

    \b
    What would it do?        outrider controller --discover kubernetes:NAMESPACE --dry-run
    Drafters cost a tenth:   outrider controller --verifier-price 4 --drafter-price 0.4
    """
    try:
        config = _config(options)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    from orchestrator.cluster.app import serve

    run(serve(config))


def _config(options: dict[str, Any]) -> Any:
    try:
        from orchestrator.cluster.api import Workload
        from orchestrator.cluster.app import ProcessConfig
        from orchestrator.cluster.controller import ControllerConfig
        from orchestrator.cluster.discovery import Place
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; pip install 'outrider[kubernetes]'"
        ) from None
    prices = None
    if (options["verifier_price"] is None) != (options["drafter_price"] is None):
        raise ConfigError("--verifier-price, --drafter-price: give both prices or none")
    if options["verifier_price"] is not None:
        prices = Prices(options["verifier_price"], options["drafter_price"])
    workloads = {
        fleet: Workload.read(options[fleet.value]) for fleet in FleetName if options[fleet.value]
    }
    policy = PolicyConfig(
        limits={fleet: _limits(fleet, options) for fleet in workloads},
        verifiers=VerifierGoals(
            queue_wait_s=options["queue_wait_goal_s"],
            kv_share=options["kv_goal"],
            occupancy=options["occupancy_goal"],
        ),
        drafters=DrafterGoals(prices=prices, step_nodes_max=options["step_nodes_max"]),
        stale_after_s=options["stale_after_s"],
    )
    return ProcessConfig(
        place=Place.read(options["discover"]),
        controller=ControllerConfig(
            policy, workloads, interval_s=options["interval_s"], dry_run=options["dry_run"]
        ),
        name=options["name"] or f"controller-{secrets.token_hex(4)}",
        lease=options["lease"],
        host=options["host"],
        port=options["port"],
        metrics_key=options["metrics_key"],
        metrics_ca=options["metrics_ca"],
        metrics_server_name=options["metrics_server_name"],
    )


def _limits(fleet: FleetName, options: dict[str, Any]) -> Limits:
    try:
        return replace(
            DEFAULT_LIMITS[fleet],
            floor=options[f"{fleet.value}_floor"],
            ceiling=options[f"{fleet.value}_ceiling"],
            down_window_s=options["shrink_after_s"],
        )
    except ConfigError as error:
        raise ConfigError(f"--{fleet.value}-floor, --{fleet.value}-ceiling: {error}") from None


if __name__ == "__main__":
    command()
