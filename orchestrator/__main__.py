"""`python -m orchestrator`, and `outrider orchestrator`."""

from __future__ import annotations

import secrets
from typing import Any

import click

from orchestrator.config import DriverConfig, HttpConfig, JournalConfig, OrchestratorConfig
from orchestrator.http.options import http_options
from outrider.domain import TENANT_WEIGHT_MAX, DraftBudget
from outrider.serving.loops import run
from outrider.serving.options import address_options, service_options

_LIMITS = DriverConfig().budget_limits


@click.command("orchestrator", context_settings={"auto_envvar_prefix": "OUTRIDER_ORCHESTRATOR"})
@click.option("--verifier", "verifiers", multiple=True, help="Static host:port; repeatable.")
@click.option("--drafter", "drafters", multiple=True, help="Static host:port; repeatable.")
@click.option(
    "--discover",
    help="Find workers through the Kubernetes API instead of Redis: kubernetes:NAMESPACE, or"
    " kubernetes:NAMESPACE/SELECTOR for Services with other labels than ours.",
)
@address_options
@click.option("--name", help="Shown in the workers' logs.  [default: random]")
@click.option(
    "--sessions-max",
    type=click.IntRange(min=1),
    default=DriverConfig.sessions_max,
    show_default=True,
    help="Sessions at once, one for each continuation; more are refused.",
)
@click.option(
    "--choices-max",
    type=click.IntRange(min=1),
    default=DriverConfig.choices_max,
    show_default=True,
    help="Continuations that one request may ask for (n).",
)
@click.option(
    "--drafters-per-session",
    type=click.IntRange(min=0),
    default=DriverConfig.drafters_per_session,
    show_default=True,
    help="Drafters that guess for one session at once, at most; 0: nobody guesses.",
)
@click.option(
    "--draft-nodes-max",
    type=click.IntRange(min=1),
    default=_LIMITS.nodes_max,
    show_default=True,
    help="Live guesses of one drafter for one session, at most.",
)
@click.option(
    "--draft-depth-max",
    type=click.IntRange(min=1),
    default=_LIMITS.depth_max,
    show_default=True,
    help="How far drafters run ahead at most, in tokens.",
)
@click.option(
    "--draft-width-max",
    type=click.IntRange(min=1),
    default=_LIMITS.width_max,
    show_default=True,
    help="Guesses after one token, at most.",
)
@click.option(
    "--tenant-weight",
    "tenant_weights",
    type=(str, click.FloatRange(min=0, min_open=True, max=TENANT_WEIGHT_MAX)),
    multiple=True,
    metavar="TENANT WEIGHT",
    help="A tenant's share in drafters beside the others', who have 1; repeatable.",
)
@click.option(
    "--own-guesses/--no-own-guesses",
    default=DriverConfig.own_guesses,
    show_default=True,
    help="Have verifiers guess from generations' own text, beside the drafters.",
)
@click.option(
    "--verifier-timeout",
    "verifier_timeout_s",
    type=click.FloatRange(min=0.1),
    default=DriverConfig.verifier_timeout_s,
    show_default=True,
    help="Seconds without progress after which a verifier counts as lost.",
)
@click.option(
    "--worker-timeout",
    "worker_timeout_s",
    type=click.FloatRange(min=0.1),
    default=DriverConfig.worker_timeout_s,
    show_default=True,
    help="Seconds after which a worker that does not answer counts as lost.",
)
@click.option(
    "--failover-wait",
    "failover_wait_s",
    type=click.FloatRange(min=0),
    default=DriverConfig.failover_wait_s,
    show_default=True,
    help="Seconds that a generation waits for another verifier when it has lost its own.",
)
@click.option(
    "--grpc-write-timeout",
    "write_timeout_s",
    type=click.FloatRange(min=0.1),
    default=DriverConfig.write_timeout_s,
    show_default=True,
    help="Seconds after which a gRPC client that reads nothing is given up.",
)
@click.option(
    "--rebalance/--no-rebalance",
    default=DriverConfig.rebalance,
    show_default=True,
    help="Move generations to verifiers that serve them better, where it pays.",
)
@click.option(
    "--journal/--no-journal",
    default=True,
    show_default=True,
    help="Keep requests and output in Redis while they are under way, so that another orchestrator"
    " can go on with them. Without, no content is kept there.",
)
@click.option(
    "--journal-retention",
    "journal_retention_s",
    type=click.FloatRange(min=1),
    default=JournalConfig.retention_s,
    show_default=True,
    help="Seconds for which Redis keeps a generation after its last token.",
)
@click.option(
    "--journal-deadline",
    "journal_deadline_s",
    type=click.FloatRange(min=0.01),
    default=JournalConfig.deadline_s,
    show_default=True,
    help="Seconds that output waits for Redis at most, before it goes on without being resumable.",
)
@http_options
@service_options("orchestrator")
def command(
    name: str | None,
    sessions_max: int,
    choices_max: int,
    drafters_per_session: int,
    draft_nodes_max: int,
    draft_depth_max: int,
    draft_width_max: int,
    tenant_weights: tuple[tuple[str, float], ...],
    own_guesses: bool,
    verifier_timeout_s: float,
    worker_timeout_s: float,
    failover_wait_s: float,
    write_timeout_s: float,
    rebalance: bool,
    journal: bool,
    journal_retention_s: float,
    journal_deadline_s: float,
    http: HttpConfig | None,
    **options: Any,
) -> None:
    """Run an orchestrator: the front door; finds workers in Redis and by static addresses.

    Clients reach it by gRPC (--port) and by OpenAI's HTTP (--http-address), where metrics and the
    live page are as well. Any number of orchestrators may share one Redis; each serves them all.

    \b
    Workers by address, no Redis:   outrider orchestrator --port 50050 --verifier gpu1:50051 \
                                      --drafter cpu1:50052
    Workers that Redis knows:       outrider orchestrator --port 50050 --redis redis://redis:6379
    For others, with TLS and keys:  outrider orchestrator --http-address 0.0.0.0:8443 \
                                      --http-cert door.pem --http-key door.key --api-keys keys.toml
    A key for that file:            printf %s "$KEY" | sha256sum

    Every option is an environment variable as well: OUTRIDER_ORCHESTRATOR_SESSIONS_MAX=64.
    """
    config = OrchestratorConfig(
        name=name or f"orchestrator-{secrets.token_hex(4)}",
        driver=DriverConfig(
            sessions_max=sessions_max,
            choices_max=choices_max,
            drafters_per_session=drafters_per_session,
            budget_limits=DraftBudget(
                nodes_max=draft_nodes_max, depth_max=draft_depth_max, width_max=draft_width_max
            ),
            tenant_weights=dict(tenant_weights),
            own_guesses=own_guesses,
            verifier_timeout_s=verifier_timeout_s,
            worker_timeout_s=worker_timeout_s,
            failover_wait_s=failover_wait_s,
            write_timeout_s=write_timeout_s,
            rebalance=rebalance,
        ),
        journal=JournalConfig(retention_s=journal_retention_s, deadline_s=journal_deadline_s)
        if journal
        else None,
        http=http,
        **options,
    )
    if not (config.redis_url or config.verifiers or config.discover):
        raise click.UsageError(
            "give --redis (or REDIS_URL), --discover, or at least one --verifier"
        )
    from orchestrator.app import serve

    run(serve(config))


if __name__ == "__main__":
    command()
