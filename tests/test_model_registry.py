"""`model_registry.py` as a user runs it: what it lists, what it promotes, the way back, and how wrong use is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from sqlalchemy.engine import make_url

from model_registry import main, promote_model
from perpcast.config import Settings, load_settings
from perpcast.database import REGISTRY, Database, read_events, read_model, upsert_model
from perpcast.errors import DataError, MissingInputError
from perpcast.training import judgement
from perpcast.training.promotion import Evidence, PromotionRefusedError
from tests.live_bundle import make_model
from tests.live_world import POLICY
from tests.test_database_registry import model, states
from tests.test_training_promotion import CHAMPION, FIRST, GOOD, LAST, later

ROOT = Path(__file__).parents[1]
SCORES = {"rank_ic": {"value": 0.0214}, "trade_return": {"value": -0.0012}, "win_rate": {"value": None}}


@pytest.fixture
def config(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    url = make_url(database.url)
    monkeypatch.setenv("PERPCAST_DB_PASSWORD", url.password or "")
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["database"].update(port=url.port, name=url.database, user=url.username)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def settings(config: Path) -> Settings:
    return load_settings([config])


@pytest.fixture
def models(database: Database, tmp_path: Path) -> Database:
    """The candidates a, b and c, each with its bundle."""
    for model_id in "abc":
        make_model(database, tmp_path, ("AAAUSDT", "BBBUSDT"), {"buy": POLICY, "sell": POLICY}, model_id)
    return database


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--config", str(config)])


def evidence_on(span: int, over: str | None = None) -> Evidence:
    """Evidence that suffices, on one of the spans that share no bar."""
    return later(replace(GOOD, gain_over_champion=replace(CHAMPION, against=over) if over else None), 200 * span)


def promote(settings: Settings, database: Database, model_id: str, evidence: Evidence, *, force: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judgement, "gather_evidence", lambda *asked: evidence)
        promote_model(settings, database, model_id, force=force)


def test_without_models_the_next_step_is_named(config: Path) -> None:
    shown = run(config, "list")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout == "no model trained yet; next: python train_universal_transformer.py\n"


def test_list_shows_each_kind_with_states_scores_and_looks(
    config: Path, settings: Settings, models: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"scores": SCORES, "first_ms": FIRST, "last_ms": LAST}
    upsert_model(models, replace(model("tft-0123456789ab", "classification"), metrics=metrics))
    promote(settings, models, "b", evidence_on(0))
    assert capsys.readouterr().out.startswith("b is the champion of regression\nnext: python live_runner.py")
    shown = run(config, "list").stdout
    assert "…" not in shown, "80 columns are enough"
    lines = [line.split() for line in shown.splitlines()]
    assert lines.index(["regression"]) < lines.index(["classification"])
    assert ["a", "candidate", "2025-07-01", "-", "-", "-", "-"] in lines
    assert ["b", "champion", "2025-07-01", "-", "-", "-", "-"] in lines
    # The promotion of b was a look at the same bars.
    assert ["tft-0123456789ab", "candidate", "2025-07-01", "2025-01-01", "+0.021", "-0.12%", "1"] in lines


def test_list_tells_what_rented_machines_cost(config: Path, models: Database) -> None:
    bill = {"gpu": "RTX 4090", "price_per_hour": 0.42, "hours": 1.3, "cost": 0.546}
    upsert_model(models, replace(model("tft-0123456789ab", "regression"), metrics={"rental": bill}))
    shown = run(config, "list").stdout
    assert "tft-0123456789ab: 1.3 h on a rented RTX 4090, 0.55 USD\n" in shown
    assert shown.count("rented") == 1


def test_list_without_a_champion_says_what_is_traded(config: Path, models: Database) -> None:
    assert "no champion: live_runner.py takes the newest; next: python model_registry.py promote" in run(
        config, "list"
    ).stdout.replace("\n", " ")


def test_promote_rollback_and_retire(
    config: Path, settings: Settings, models: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(settings, models, "a", evidence_on(0))
    promote(settings, models, "b", evidence_on(1, over="a"))
    assert "b is the champion of regression in place of a\n" in capsys.readouterr().out
    back = run(config, "rollback")
    assert (back.exit_code, back.stderr) == (0, "")
    assert back.stdout.startswith("a is the champion of regression again\n")
    assert states(models) == {"a": "champion", "b": "retired", "c": "candidate"}
    further = run(config, "rollback")
    assert further.exit_code == 2
    assert "error: regression has no champion before a to go back to" in further.stderr
    retired = run(config, "retire", "a")
    assert retired.stdout.startswith("a is retired\nits place is empty; next: python model_registry.py rollback")
    assert run(config, "retire", "c").stdout == "c is retired\n"
    assert states(models) == {"a": "retired", "b": "retired", "c": "retired"}


def test_refused_promotion_changes_nothing_and_lists_what_is_missing(settings: Settings, models: Database) -> None:
    weak = replace(evidence_on(0), certificate_passed=False, certificate_detail="its card holds none")
    for force in (False, True):
        with pytest.raises(
            PromotionRefusedError, match="a is not promoted, .*\n  - a leak certificate that passes: its"
        ):
            promote(settings, models, "a", weak, force=force)
    assert states(models)["a"] == "candidate"
    assert [event.kind for event in read_events(models, REGISTRY)] == ["test_span_looked_at", "promotion_refused"] * 2


def test_force_promotes_on_a_used_span(settings: Settings, models: Database) -> None:
    promote(settings, models, "a", evidence_on(0))
    again = evidence_on(0, over="a")
    with pytest.raises(PromotionRefusedError, match="a test span of its own"):
        promote(settings, models, "b", again)
    promote(settings, models, "b", again, force=True)
    assert states(models)["b"] == "champion"


def test_champion_promoted_again_is_not_looked_at_again(
    settings: Settings, models: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(settings, models, "a", evidence_on(0))
    before = read_events(models, REGISTRY)

    def gather(*asked: object) -> Evidence:
        raise AssertionError("the test span was looked at")

    monkeypatch.setattr(judgement, "gather_evidence", gather)
    promote_model(settings, models, "a")
    assert read_events(models, REGISTRY) == before


def test_model_whose_bundle_is_gone_or_another_is_neither_promoted_nor_gone_back_to(
    config: Path, settings: Settings, models: Database
) -> None:
    promote(settings, models, "a", evidence_on(0))
    promote(settings, models, "b", evidence_on(1, over="a"))
    folder = Path(read_model(models, "a").bundle_path)
    shutil.rmtree(folder)
    back = run(config, "rollback")
    assert back.exit_code == 2
    assert "no model bundle in" in back.stderr
    with pytest.raises(MissingInputError, match="no model bundle in"):
        promote(settings, models, "a", evidence_on(2, over="b"))

    shutil.copytree(folder.parent / "b", folder)
    upsert_model(models, replace(read_model(models, "c"), bundle_sha256="0" * 64))
    with pytest.raises(DataError, match=r"expected the bundle 000000000000 .* put back the folder of c, or retire it"):
        promote(settings, models, "c", evidence_on(2, over="b"))
    assert states(models) == {"a": "retired", "b": "champion", "c": "candidate"}
    assert json.loads((folder / "task.json").read_text()), "the folder was only read"


@pytest.mark.parametrize("command", ["promote", "retire"])
def test_unknown_model_is_wrong_use(config: Path, models: Database, command: str) -> None:
    refused = run(config, command, "nobody")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: no model nobody in model_metadata; python model_registry.py list")


def test_unknown_task_is_wrong_use(config: Path) -> None:
    refused = run(config, "rollback", "--task", "ranking")
    assert refused.exit_code == 2
    assert "'ranking' is not one of 'regression', 'classification'" in refused.stderr


@pytest.mark.parametrize("command", ["list", "promote", "rollback", "retire"])
def test_each_command_explains_itself_with_an_example(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"]).stdout
    assert f"python model_registry.py {command}" in shown
    assert "--config" in shown
