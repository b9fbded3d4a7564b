"""What is in `deploy/` fits the server and itself: settings exist, times add up, names meet, schemas hold, nginx takes its file."""

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fake_engine import FakeEngineClient

from engine.config import read_model_config
from server.engine_process import STOP_GRACE_S
from server.lifecycle import FAREWELL_S, IDLE_CONNECTION_S
from server.limits import Limits
from server.observability import Metrics
from server.settings import ENV_PREFIX, Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
NGINX = (DEPLOY / "nginx.conf").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
MANIFESTS: dict[str, dict[str, Any]] = {
    name.removesuffix(".yaml"): yaml.safe_load((KUBERNETES / name).read_text()) for name in KUSTOMIZATION["resources"]
}
VERSIONS = ("1.30", "1.33", kubernetes_validate.latest_version())
USER = int(re.findall(r"useradd --uid (\d+)", DOCKERFILE)[0])


def seconds(text: str) -> float:
    amount, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", text).groups()
    return int(amount) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


def stopping_s(settings: Settings) -> float:
    """The longest that a server takes from SIGTERM to its end."""
    return settings.shutdown_notice + settings.shutdown_timeout + FAREWELL_S + STOP_GRACE_S


def settings_of(environment: dict[str, str]) -> Settings:
    """As the server reads them, without files that are elsewhere. Raises `ConfigError` for a value that cannot be."""
    return load_settings({name.removeprefix(ENV_PREFIX).lower(): value for name, value in environment.items()})


# every file


@pytest.mark.parametrize("path", sorted(path for path in DEPLOY.rglob("*") if path.is_file()), ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(path: Path):
    text = path.read_text()

    variables = {name.lower() for name in re.findall(rf"\b{ENV_PREFIX}([A-Z_]+)", text)}
    flags = {flag.replace("-", "_") for flag in re.findall(r"grok-server serve.*?--([a-z-]+)", text)}
    spoken_of = set(re.findall(r"\b((?:shutdown|engine|max)_[a-z_]+)\b", text)) - {"max_fails"}

    assert sorted((variables | flags | spoken_of) - {*Settings.model_fields}) == []


# compose.yaml


def with_defaults(value: Any) -> Any:
    """What Compose reads where the environment says nothing; what has no default stands as `/given`."""
    if isinstance(value, dict):
        return {key: with_defaults(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_defaults(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:([-?])([^}]*)\}", lambda match: match[2] if match[1] == "-" else "/given", value)
    return value


COMPOSE = with_defaults(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
each_service = pytest.mark.parametrize("name", SERVICES)


def test_compose_starts_the_cpu_unless_told_otherwise():
    assert [name for name, service in SERVICES.items() if not service.get("profiles")] == ["cpu"]


@each_service
def test_a_service_is_built_from_a_target_that_the_image_has(name: str):
    build = SERVICES[name]["build"]

    assert (DEPLOY / build["context"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, flags=re.MULTILINE)


@each_service
def test_a_service_starts_with_settings_that_can_be(name: str):
    settings = settings_of(SERVICES[name]["environment"])

    assert settings.api_key_file == Path("/run/secrets/api-keys")
    assert "api-keys" in SERVICES[name]["secrets"]
    assert {*SERVICES[name]["secrets"]} <= {*COMPOSE["secrets"]}


@each_service
def test_a_service_has_what_its_settings_point_to(name: str):
    service = SERVICES[name]
    settings = settings_of(service["environment"])
    mounts = {Path(volume["target"]): volume for volume in service["volumes"]}

    assert mounts[settings.model]["read_only"] is True
    assert read_model_config(DEPLOY / mounts[settings.model]["source"])
    assert mounts[settings.compile_cache_dir]["source"] in COMPOSE["volumes"]
    assert [port.rsplit(":", 1)[1] for port in service["ports"]] == [str(settings.port)]
    assert settings.host == "0.0.0.0"


@each_service
def test_a_service_listens_on_this_machine_alone_unless_told_otherwise(name: str):
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


@each_service
def test_a_service_may_do_little(name: str):
    service = SERVICES[name]

    assert service["user"] == f"{USER}:{USER}"
    assert service["read_only"] is True
    assert [tmpfs.split(":")[0] for tmpfs in service["tmpfs"]] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]


@each_service
def test_a_service_is_healthy_once_it_is_ready_and_has_as_long_to_load_as_in_the_image(name: str):
    health = SERVICES[name]["healthcheck"]

    assert health["test"][0] == "CMD"
    assert f":{settings_of(SERVICES[name]['environment']).port}/readyz" in health["test"][-1]
    assert seconds(health["start_period"]) == seconds(re.findall(r"--start-period=(\w+)", DOCKERFILE)[0])
    assert seconds(health["start_period"]) >= Settings.model_fields["engine_start_timeout"].default


@each_service
def test_a_service_is_not_killed_while_it_drains(name: str):
    grace_s = seconds(SERVICES[name]["stop_grace_period"])

    assert stopping_s(settings_of(SERVICES[name]["environment"])) <= grace_s < 2 * stopping_s(settings_of(SERVICES[name]["environment"]))


def test_the_gpus_are_given_to_the_service_that_is_built_for_them():
    (device,) = SERVICES["cuda"]["deploy"]["resources"]["reservations"]["devices"]

    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["cpu"]


# kubernetes/

DEPLOYMENT = MANIFESTS["deployment"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
MOUNTS = {Path(mount["mountPath"]): mount for mount in CONTAINER["volumeMounts"]}
VOLUMES = {volume["name"]: volume for volume in POD["volumes"]}


@pytest.fixture
def replica() -> Settings:
    """The settings of a replica."""
    return load_settings({"config": KUBERNETES / "serve.yaml"})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_kubernetes_takes(name: str, version: str):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_validator_sees_a_misspelt_field():
    misspelt = MANIFESTS["disruption-budget"] | {"spec": {"maxUnavailables": 1}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, VERSIONS[-1], strict=True)


def test_every_file_is_applied_made_into_a_map_or_no_manifest():
    (settings_map,) = KUSTOMIZATION["configMapGenerator"]
    others = {"kustomization.yaml", "prometheus-adapter.yaml", *settings_map["files"]}

    assert {path.name for path in KUBERNETES.iterdir()} == {*KUSTOMIZATION["resources"]} | others
    assert [image["name"] for image in KUSTOMIZATION["images"]] == [CONTAINER["image"].split(":")[0]]


def test_a_replica_finds_all_that_its_settings_point_to(replica: Settings):
    (settings_map,) = KUSTOMIZATION["configMapGenerator"]
    (config,) = (Path(variable["value"]) for variable in CONTAINER["env"] if variable["name"] == f"{ENV_PREFIX}CONFIG")

    assert VOLUMES[MOUNTS[config]["name"]]["configMap"]["name"] == settings_map["name"]
    assert config.name == MOUNTS[config]["subPath"] == settings_map["files"][0]
    assert MOUNTS[replica.model]["readOnly"] is True
    assert "emptyDir" in VOLUMES[MOUNTS[replica.compile_cache_dir]["name"]]
    assert "secret" in VOLUMES[MOUNTS[replica.api_key_file.parent]["name"]]
    assert (replica.port, replica.metrics_port) == (PORTS["http"], PORTS["metrics"])
    assert (replica.host, replica.metrics_host) == ("0.0.0.0", "0.0.0.0")
    assert str(replica.tensor_parallel_size) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]


def test_the_image_contradicts_no_setting_of_a_replica(replica: Settings):
    """The image's environment would win."""
    set_in_image = dict(re.findall(rf"{ENV_PREFIX}([A-Z_]+)=(\S+)", DOCKERFILE))

    assert {name.lower(): str(getattr(replica, name.lower())) for name in set_in_image} == {
        name.lower(): value for name, value in set_in_image.items()
    }


def test_every_mount_is_a_volume_and_every_volume_is_mounted():
    assert sorted(mount["name"] for mount in CONTAINER["volumeMounts"]) == sorted(VOLUMES)


def test_keys_are_hidden_from_other_users_and_kept_out_of_the_environment():
    (keys,) = (volume["secret"] for volume in VOLUMES.values() if "secret" in volume)

    assert keys["defaultMode"] == 0o440
    assert [variable["name"] for variable in CONTAINER["env"] if "KEY" in variable["name"]] == []


def test_no_service_sets_a_setting():
    """Kubernetes puts `NAME_PORT` into the environment of pods for every service; `GROK_SERVER_PORT` is a setting."""
    assert POD["enableServiceLinks"] is False
    assert not MANIFESTS["service"]["metadata"]["name"].upper().replace("-", "_").startswith(ENV_PREFIX.rstrip("_"))


def test_a_pod_may_do_little():
    assert POD["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER}.items()
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("memory" in CONTAINER["resources"][kind] for kind in ("requests", "limits"))


def test_probes_ask_what_they_are_for():
    asked = {kind: CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}

    assert {kind: probe["path"] for kind, probe in asked.items()} == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert {probe["port"] for probe in asked.values()} == {"http"}


def test_a_start_without_progress_is_ended_by_the_server_before_kubernetes_loses_patience(replica: Settings):
    probe = CONTAINER["startupProbe"]
    room_s = probe["periodSeconds"] * probe["failureThreshold"]

    assert room_s > 2 * replica.engine_start_timeout
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > room_s + POD["terminationGracePeriodSeconds"]


def test_a_pod_is_unready_for_everybody_before_it_refuses_and_not_killed_while_it_drains(replica: Settings):
    probe = CONTAINER["readinessProbe"]
    grace_s = POD["terminationGracePeriodSeconds"]

    assert 2 * probe["periodSeconds"] * probe["failureThreshold"] < replica.shutdown_notice
    assert "lifecycle" not in CONTAINER
    assert stopping_s(replica) <= grace_s <= stopping_s(replica) + 30


def test_whatever_selects_pods_selects_the_replicas():
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        MANIFESTS["service"]["spec"]["selector"],
        MANIFESTS["disruption-budget"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["network-policy"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
    ]

    assert all(selector and selector.items() <= LABELS.items() for selector in selectors)
    assert MANIFESTS["service"]["spec"]["ports"][0]["targetPort"] in PORTS


def test_replicas_may_call_nobody_and_only_known_ports_are_open():
    policy = MANIFESTS["network-policy"]["spec"]

    assert {*policy["policyTypes"]} == {"Ingress", "Egress"}
    assert policy["egress"] == []
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == {*PORTS}
    assert all(rule["from"] for rule in policy["ingress"])


def test_the_autoscaler_counts_a_metric_that_the_server_exports():
    spec = MANIFESTS["autoscaler"]["spec"]
    (metric,) = spec["metrics"]
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    series = rule["seriesQuery"].split("{")[0]

    assert spec["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.fullmatch(rule["name"]["matches"], series)
    assert f"\n{series} " in Metrics(FakeEngineClient(), model_name="m").scrape().decode()
    assert "replicas" not in DEPLOYMENT["spec"], "the autoscaler owns the number"
    assert spec["minReplicas"] > MANIFESTS["disruption-budget"]["spec"]["maxUnavailable"]


def test_prometheus_scrapes_the_metrics_port():
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]

    assert annotations["prometheus.io/port"] == str(PORTS["metrics"])
    assert annotations["prometheus.io/path"] == "/metrics"


# leaderworkerset/

HOSTS = DEPLOY / "leaderworkerset"
HOSTS_KUSTOMIZATION = yaml.safe_load((HOSTS / "kustomization.yaml").read_text())
HOSTS_MANIFESTS: dict[str, dict[str, Any]] = {
    name.removesuffix(".yaml"): yaml.safe_load((HOSTS / name).read_text()) for name in HOSTS_KUSTOMIZATION["resources"]
}
SET = HOSTS_MANIFESTS["leaderworkerset"]
TEMPLATES = {name: SET["spec"]["leaderWorkerTemplate"][f"{name}Template"] for name in ("leader", "worker")}


@pytest.fixture
def hosts() -> Settings:
    """The settings of a replica on several hosts."""
    return load_settings({"config": HOSTS / "serve.yaml"})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_of_a_host_is_what_kubernetes_takes(name: str, version: str):
    """The set itself is no part of Kubernetes; its other fields were checked against its own schema by hand."""
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": TEMPLATES[name]}

    kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted({*HOSTS_MANIFESTS} - {"leaderworkerset"}))
def test_what_belongs_to_a_set_is_what_kubernetes_takes(name: str, version: str):
    kubernetes_validate.validate(HOSTS_MANIFESTS[name], version, strict=True)


def test_a_set_says_how_many_hosts_there_are_and_what_happens_to_them():
    assert SET["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert {*SET["spec"]} == {"replicas", "rolloutStrategy", "leaderWorkerTemplate"}
    assert {*SET["spec"]["leaderWorkerTemplate"]} == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert SET["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_a_worker_is_a_leader_that_nobody_asks_and_that_has_no_keys():
    (leader,), (worker,) = (TEMPLATES[name]["spec"]["containers"] for name in ("leader", "worker"))
    without_keys = [mount for mount in leader["volumeMounts"] if mount["name"] != "keys"]
    volumes = [volume for volume in TEMPLATES["leader"]["spec"]["volumes"] if volume["name"] != "keys"]

    assert {*leader} - {*worker} == {"ports", "startupProbe", "readinessProbe", "livenessProbe"}
    assert worker == {name: leader[name] for name in worker} | {"volumeMounts": without_keys}
    assert TEMPLATES["worker"]["spec"] == TEMPLATES["leader"]["spec"] | {"containers": [worker], "volumes": volumes}


def test_a_leader_is_a_replica_that_needs_other_hosts(hosts: Settings, replica: Settings):
    (leader,) = TEMPLATES["leader"]["spec"]["containers"]
    size = SET["spec"]["leaderWorkerTemplate"]["size"]
    with_settings = [{"name": "settings", "configMap": {"name": HOSTS_KUSTOMIZATION["configMapGenerator"][0]["name"]}}]
    group = [{"name": "group", "containerPort": hosts.master_port}]

    assert leader | {"ports": leader["ports"]} == CONTAINER | {"ports": CONTAINER["ports"] + group}
    assert TEMPLATES["leader"]["spec"]["volumes"] == with_settings + [volume for volume in POD["volumes"] if volume["name"] != "settings"]
    assert hosts.tensor_parallel_size == size * replica.tensor_parallel_size
    assert {name for name in Settings.model_fields if getattr(hosts, name) != getattr(replica, name)} == {"config", "tensor_parallel_size"}


def test_a_set_names_nothing_that_is_not_there():
    labels = TEMPLATES["leader"]["metadata"]["labels"]
    service, policy = HOSTS_MANIFESTS["service"]["spec"], HOSTS_MANIFESTS["network-policy"]["spec"]

    assert {path.name for path in HOSTS.iterdir()} == {
        *HOSTS_KUSTOMIZATION["resources"],
        "kustomization.yaml",
        "kustomize.yaml",
        "serve.yaml",
    }
    assert service["selector"].items() <= labels.items()
    assert not service["selector"].items() <= TEMPLATES["worker"]["metadata"]["labels"].items(), "a worker answers no requests"
    assert all(policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items() for template in TEMPLATES.values())
    assert HOSTS_MANIFESTS["service"]["metadata"]["name"] != SET["metadata"]["name"], "the set's own service has that name"


# nginx.conf


def directive(name: str) -> list[str]:
    """The values of a directive, wherever it stands."""
    return re.findall(rf"^\s*{name} ([^;{{]+);", NGINX, flags=re.MULTILINE)


def test_nginx_takes_the_file(tmp_path: Path):
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    temporary = "\n".join(f"{kind}_temp_path {tmp_path};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main = tmp_path / "nginx.conf"
    main.write_text(
        f"pid {tmp_path}/pid; error_log stderr;\nevents {{}}\nhttp {{ access_log off; {temporary}\ninclude {DEPLOY / 'nginx.conf'}; }}\n"
    )

    done = subprocess.run([nginx, "-t", "-p", tmp_path, "-c", main], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def test_nginx_holds_back_no_token_and_no_prompt_on_a_disk():
    assert directive("proxy_buffering") == ["off"]
    assert directive("client_max_body_size") == directive("client_body_buffer_size") == [f"{Limits().max_body_bytes // 2**20}m"]


def test_nginx_asks_another_replica_once_and_never_because_an_answer_takes_long():
    (cases,) = directive("proxy_next_upstream")
    (within,) = directive("proxy_next_upstream_timeout")

    assert {*cases.split()} == {"error", "timeout", "http_502", "http_503", "non_idempotent"}
    assert directive("proxy_next_upstream_tries") == ["2"]
    assert seconds(directive("proxy_connect_timeout")[0]) < seconds(within)
    assert min(seconds(value) for name in ("proxy_read_timeout", "proxy_send_timeout") for value in directive(name)) > seconds(within)
    assert seconds(directive("proxy_read_timeout")[0]) > Limits().max_timeout_s


def test_nginx_closes_idle_connections_before_a_replica_does():
    (idle,) = directive("keepalive_timeout")

    assert seconds(idle) < IDLE_CONNECTION_S


def test_nginx_knows_failed_replicas_and_says_when_to_come_back():
    assert len(directive("server")) > 1
    pauses_s = {seconds(re.findall(r"max_fails=1 fail_timeout=(\w+)", server)[0]) for server in directive("server")}

    assert directive("add_header") == [f"Retry-After {math.ceil(*pauses_s)} always"]
