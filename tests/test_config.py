"""The configuration: the user's values, overlays, and what is said about a mistake."""

from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from perpcast.config import Settings, load_settings
from perpcast.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_config_holds_the_users_values() -> None:
    settings = load_settings([ROOT / "config.yaml"])
    assert settings.database.port == 5555
    assert settings.data_download.interval == "15"
    assert settings.data_download.days == 1095
    assert len(settings.data_download.symbols) == 51
    profile = settings.risk_profile
    assert (profile.leverage, profile.stop_loss_pct_buy, profile.take_profit_pct_buy) == (
        10,
        Decimal("0.989"),
        Decimal("1.058"),
    )
    assert (profile.stop_loss_pct_sell, profile.take_profit_pct_sell) == (Decimal("1.011"), Decimal("0.942"))
    assert [(c.target_pct, c.close_fraction, c.stop_pct) for c in profile.partial_closes] == [
        (Decimal("1.2"), Decimal("0.2"), Decimal("0")),
        (Decimal("2.4"), Decimal("0.3"), Decimal("1.2")),
        (Decimal("3.5"), Decimal("0.3"), Decimal("2.4")),
    ]
    fees = settings.fees
    assert (fees.taker, fees.maker, fees.slippage) == (Decimal("0.00055"), Decimal("0.0002"), Decimal("0.0002"))
    capital = settings.capital
    assert (capital.initial, capital.per_trade_percentage, capital.max_positions, capital.max_drawdown_percentage) == (
        10000,
        2,
        5,
        10,
    )
    model = settings.model
    assert (model.architecture, model.sequence_length, model.prediction_horizon) == ("tft", 60, 100)
    assert (model.d_model, model.num_heads, model.dropout) == (128, 8, 0.2)
    assert (model.batch_size, model.batch_size_gpu, model.epochs) == (32, 64, 100)


def test_overlay_changes_only_what_it_names() -> None:
    plain, demo = (
        load_settings([ROOT / "config.yaml"]),
        load_settings([ROOT / "config.yaml", ROOT / "config.demo.yaml"]),
    )
    assert (demo.model.d_model, len(demo.data_download.symbols), demo.data_download.days) == (32, 12, 545)
    assert demo.risk_profile == plain.risk_profile
    assert demo.model.sequence_length == plain.model.sequence_length


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("risk_profil: {}", "unknown key risk_profil"),
        ("model: {d_modell: 64}", "unknown key model.d_modell"),
        ("files: [/somewhere]", "'files' is not a key"),
        ("database: {port: many}", "database.port: .*integer.* received 'many'"),
        ("database: {port: 70000}", "database.port: .*65535.* received 70000"),
        ("model: {dropout: .nan}", "model.dropout: .*received nan"),
        ("model: {num_heads: 3}", "d_model 128 must be a multiple of num_heads 3"),
        ("risk_profile: {stop_loss_pct_buy: 1.011}", "stop_loss_pct_buy must lie below 1"),
        ("risk_profile: {stop_loss_pct_sell: 0.989}", "stop_loss_pct_sell must lie above 1"),
        (
            "risk_profile: {partial_closes: [{target_pct: 1.2, close_fraction: 0.7, stop_pct: 0},"
            " {target_pct: 2.4, close_fraction: 0.4, stop_pct: 0}]}",
            "risk_profile: .*add up to 1.1, more than 1",  # 0.7 + 0.4
        ),
        ("risk_profile: {partial_closes: [{target_pct: 7, close_fraction: 0.7, stop_pct: 0}]}", "between 0 and 5.8"),
        ("dataset: {train_fraction: 0.9}", "must add up to 1, they add up to 1.2"),  # 0.9 + 0.075 + 0.075 + 0.15
        ("data_download: {interval: '7'}", "data_download.interval: must be one of 1, 3, 5, 15"),
        ("data_download: {symbols: [BTCUSD]}", "'BTCUSD' is not a USDT perpetual"),
        ("data_download: {symbols: [BTCUSDT, BTCUSDT]}", "listed twice: BTCUSDT"),
        ("exchange: {environment: local}", "needs both rest_url and ws_url"),
        ("exchange: {environment: moon}", "exchange.environment"),
        ("[1, 2]", r"expected sections \(name: values\), received list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_mistake_is_named_with_its_key(tmp_path: Path, overlay: str, message: str) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(overlay)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings([ROOT / "config.yaml", path])
    assert len(str(caught.value).splitlines()) <= 2


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="nowhere.yaml cannot be read: No such file or directory; name it with --config"
    ):
        load_settings([tmp_path / "nowhere.yaml"])


def test_missing_key_is_named(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    del values["fees"]["taker"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="fees.taker is missing"):
        load_settings([path])


def test_relative_paths_start_at_the_first_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((ROOT / "config.yaml").read_text())
    settings: Settings = load_settings([path])
    assert settings.path("logs") == tmp_path / "logs"
    assert settings.path("/var/logs") == Path("/var/logs")
