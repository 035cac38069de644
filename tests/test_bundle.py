"""The bundle answers by the arithmetic of its scalers, refuses what is damaged or foreign, and is written whole."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given as drawn
from hypothesis import settings as budget
from hypothesis import strategies as st

from perpcast.bundle import FILES, SUMS, Bundle, BundleParts, load_bundle, read_card, save_bundle
from perpcast.errors import DataError, MissingInputError
from perpcast.features.scaler import Scaler
from perpcast.live.forecast import bundle_forecaster, history_bars
from perpcast.outputs import OutputReading, ReturnReading
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import parse_time, to_ms
from tests.live_bundle import LinearNetwork, momentum_parts
from tests.model_world import LOOKBACK, TASK

ROOT = Path(__file__).parents[1]

# Columns: price_change_1, level, noise, hour_sin, hour_cos. Powers of two, so that the arithmetic is exact.
SCALER = Scaler((*TASK.observed, *TASK.known), (0.5, 1024.0, 0.0, 0.0, -1.0), (0.25, 64.0, 1.0, 0.5, 2.0))
READING = OutputReading(TASK, (ReturnReading(0.25, 0.5), ReturnReading(-0.5, 2.0)))
# Raw column number k of a window = k + the sum over its bars of OF_BAR x (level + 2 hour_cos + 10 symbol), scaled.
OFFSETS = np.arange(len(TASK.outputs), dtype=np.float32)
OF_BAR = 2.0 ** np.arange(1 - LOOKBACK, 1)


def network(offsets: np.ndarray = OFFSETS, of_bar: np.ndarray = OF_BAR) -> LinearNetwork:
    """That arithmetic as ONNX: embeddings are the bracket, in every unit."""
    weights = np.repeat([[0.0], [1.0], [0.0], [0.0], [2.0]], len(offsets), axis=1)
    return LinearNetwork(3, 2, weights, of_bar, offsets, of_symbol=10.0)


def graphs(network: LinearNetwork) -> dict[str, bytes]:
    return {"model": network.model(), "step": network.step(), "readout": network.readout()}


def windows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    observed = rng.normal((0.5, 1024, 0), (0.25, 64, 1), (n, TASK.lookback, 3)).astype(np.float32)
    known = rng.uniform(-1, 1, (n, TASK.lookback, 2)).astype(np.float32)
    return observed, known, [TASK.symbols[code] for code in rng.integers(0, len(TASK.symbols), n)]


def expected(observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]) -> np.ndarray:
    """The arithmetic of scaler, network and reading in float64: [n, outputs]."""
    level = (observed[..., 1].astype(float) - 1024) / 64
    hour_cos = (known[..., 1].astype(float) + 1) / 2
    code = np.array([TASK.symbols.index(symbol) for symbol in symbols])
    raw = ((level + 2 * hour_cos + 10 * code[:, None]) @ OF_BAR)[:, None] + OFFSETS
    return raw * np.repeat([0.5, 2.0], 4) + np.repeat([0.25, -0.5], 4)


def parts(**changes: Any) -> BundleParts:
    whole = BundleParts(
        **graphs(network()),
        task=TASK,
        scaler=SCALER,
        reading=READING,
        threshold=0.0012345678901234567,
        card={"model_id": "by-hand", "scores": {"mae": 0.1}},
        card_text="# by hand, ±0\n",
        golden=windows(3),
    )
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    path = tmp_path_factory.mktemp("trained_model") / "by-hand"
    save_bundle(path, parts())
    return path


@pytest.fixture(scope="module")
def bundle(written: Path) -> Bundle:
    return load_bundle(written)


@pytest.fixture
def own(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "by-hand"))


def sign(path: Path) -> None:
    """Makes the list of hashes agree with the files, as if they had been written so."""
    lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES]
    (path / SUMS).write_text("".join(lines))


# --- what it holds and what it answers -----------------------------------------------------------------------------


def test_save_bundle_and_load_bundle_are_a_round_trip(tmp_path: Path) -> None:
    saved = save_bundle(tmp_path / "trained_model" / "a", parts())
    loaded = load_bundle(str(tmp_path / "trained_model" / "a"))
    for each in (saved, loaded):
        assert (each.task, each.scaler, each.reading) == (TASK, SCALER, READING)
        assert each.threshold == 0.0012345678901234567
    assert loaded.sha256 == saved.sha256
    assert read_card(tmp_path / "trained_model" / "a") == {"model_id": "by-hand", "scores": {"mae": 0.1}}
    assert (tmp_path / "trained_model" / "a" / "card.md").read_text(encoding="utf-8") == "# by hand, ±0\n"
    assert [path.name for path in (tmp_path / "trained_model").iterdir()] == ["a"]


def test_hashes_are_those_of_sha256sum(written: Path, bundle: Bundle) -> None:
    assert {path.name for path in written.iterdir()} == {*FILES, SUMS}
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=written, check=True)
    assert bundle.sha256 == hashlib.sha256((written / SUMS).read_bytes()).hexdigest()


def test_predict_scales_inputs_and_unscales_outputs_by_hand(bundle: Bundle) -> None:
    # Older bars are 0 when scaled: level 1024, hour_cos -1.
    observed = np.tile([0.0, 1024.0, 0.0], (1, LOOKBACK, 1))
    known = np.tile([0.0, -1.0], (1, LOOKBACK, 1))
    observed[0, -1], known[0, -1] = (0.75, 1152.0, 3.0), (0.5, 1.0)
    observed[0, 1, 1] = 1024 - 64
    answers = bundle.predict(observed, known, ["CUSDT"])
    # Newest bar: level (1152 - 1024) / 64 = 2, hour_cos (1 + 1) / 2 = 1, so 2 + 2 * 1 = 4, of weight 1; bar 1: -1 of
    # weight 1 / 16; symbol 2: 10 * 2 * (1 + 1/2 + ... + 1/32) = 39.375. Sum 43.3125, then + column.
    assert {name: values.item() for name, values in answers.items()} == {
        "buy_mean": 43.3125 * 0.5 + 0.25,
        "buy_q50": 44.3125 * 0.5 + 0.25,
        "buy_q75": 45.3125 * 0.5 + 0.25,
        "buy_q90": 46.3125 * 0.5 + 0.25,
        "sell_mean": 47.3125 * 2 - 0.5,
        "sell_q50": 48.3125 * 2 - 0.5,
        "sell_q75": 49.3125 * 2 - 0.5,
        "sell_q90": 50.3125 * 2 - 0.5,
    }


@pytest.mark.parametrize("n", [0, 1, 51, 127, 128, 129, 513])
def test_predict_answers_every_window_once_and_in_order(bundle: Bundle, n: int) -> None:
    given = windows(n, seed=n)
    answers = bundle.predict(*given)
    assert list(answers) == list(TASK.outputs)
    assert all(values.shape == (n,) and values.dtype == np.float32 for values in answers.values())
    np.testing.assert_allclose(np.column_stack(list(answers.values())), expected(*given), rtol=1e-6, atol=1e-5)


def test_predict_changes_nothing_that_it_was_given(bundle: Bundle) -> None:
    observed, known, symbols = windows(4)
    for values in (observed, known):
        values.setflags(write=False)
    first, again = (bundle.predict(observed, known, symbols) for _ in range(2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])


# --- wrong inputs ---------------------------------------------------------------------------------------------------


def test_predict_for_an_unknown_symbol_is_refused(bundle: Bundle) -> None:
    observed, known, _ = windows(3)
    with pytest.raises(DataError, match="not trained on XUSDT, YUSDT; it knows 3 symbols") as caught:
        bundle.predict(observed, known, ["YUSDT", "AUSDT", "XUSDT"])
    assert "AUSDT" not in str(caught.value)


@pytest.mark.parametrize(
    ("observed", "known", "symbols", "message"),
    [
        ((2, 6, 4), (2, 6, 2), 2, r"observed must be \[2, 6, 3\], received \[2, 6, 4\]"),
        ((2, 5, 3), (2, 5, 2), 2, r"observed must be \[2, 6, 3\], received \[2, 5, 3\]"),
        ((2, 6, 3), (2, 6, 3), 2, r"known must be \[2, 6, 2\], received \[2, 6, 3\]"),
        ((2, 6, 3), (2, 6, 2), 1, r"observed must be \[1, 6, 3\], received \[2, 6, 3\]"),
        ((1, 6, 3), (2, 6, 2), 1, r"known must be \[1, 6, 2\], received \[2, 6, 2\]"),
        ((6, 3), (6, 2), 1, r"observed must be \[1, 6, 3\], received \[6, 3\]"),
        ((0,), (0,), 0, r"observed must be \[0, 6, 3\], received \[0\]"),
    ],
)
def test_predict_of_another_shape_is_refused(
    bundle: Bundle, observed: tuple[int, ...], known: tuple[int, ...], symbols: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bundle.predict(np.zeros(observed), np.zeros(known), ["AUSDT"] * symbols)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predict_of_a_value_that_is_not_finite_names_it(bundle: Bundle, value: float) -> None:
    observed, known, _ = windows(2)
    known[1, 3, 0] = value
    with pytest.raises(ValueError, match=rf"known must be finite: hour_sin of BUSDT is {value} at bar 3"):
        bundle.predict(observed, known, ["AUSDT", "BUSDT"])
    observed[0, 0, 2] = value
    with pytest.raises(ValueError, match=rf"observed must be finite: noise of AUSDT is {value} at bar 0"):
        bundle.predict(observed, known, ["AUSDT", "BUSDT"])


# --- damaged, missing, foreign --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, SUMS])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("bits", [0x01, 0x20, 0x80])
def test_flipped_byte_in_any_file_is_refused(own: Path, name: str, place: str, bits: int) -> None:
    content = bytearray((own / name).read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= bits
    (own / name).write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged: .* train again"):
        load_bundle(own)


def test_any_flipped_byte_in_the_list_of_hashes_is_refused(own: Path) -> None:
    whole = (own / SUMS).read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 0x07  # makes a carriage return of a line feed
        (own / SUMS).write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            load_bundle(own)


def test_file_that_the_list_does_not_name_is_refused(own: Path) -> None:
    lines = (own / SUMS).read_text().splitlines(keepends=True)
    (own / SUMS).write_text("".join(lines[1:]))
    with pytest.raises(DataError, match=r"is damaged: model\.onnx"):
        load_bundle(own)


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_missing_file_names_itself_and_the_next_step(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(MissingInputError, match=rf"{name} is not there; run train_universal_transformer\.py"):
        load_bundle(own)


def test_missing_folder_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no model bundle in .*/nowhere: .* run train_universal_transformer"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (("threshold",), None),
        (("threshold",), "high"),
        (("reading",), {"buy": {"mean": 0.0, "deviation": 1.0}}),
        (("reading", "sell"), {"win": 0.1, "loss": -0.1, "slope": 1.0, "intercept": 0.0}),
        (("scaler",), []),
        (("task", "lookback"), 7),
        (("task", "embargo"), 3),
        (("task", "targets"), [{"name": "buy"}]),
        (("task", "targets"), [{"name": "buy", "kind": "regression", "horizon": 8, "quantiles": []}]),
        (("task", "observed"), ["level"]),
        (("task", "symbols"), ["AUSDT"]),
        (("task",), "regression"),
    ],
)
def test_task_of_another_version_is_refused(own: Path, change: tuple[str, ...], value: Any) -> None:
    described = json.loads((own / "task.json").read_text())
    place = described
    for key in change[:-1]:
        place = place[key]
    place[change[-1]] = value
    (own / "task.json").write_text(json.dumps(described))
    sign(own)
    with pytest.raises(DataError, match="train again"):
        load_bundle(own)


@pytest.mark.parametrize("lost", ["task", "scaler", "reading", "threshold"])
def test_task_without_one_of_its_parts_is_refused(own: Path, lost: str) -> None:
    described = json.loads((own / "task.json").read_text())
    del described[lost]
    (own / "task.json").write_text(json.dumps(described))
    sign(own)
    with pytest.raises(DataError, match=rf"is of another version .*{lost}.*train again"):
        load_bundle(own)


def test_bundle_from_before_step_and_readout_is_refused(own: Path) -> None:
    """As releases before them wrote it: neither in the folder nor in the list."""
    lines = (own / SUMS).read_text().splitlines(keepends=True)
    for name in ("step.onnx", "readout.onnx"):
        (own / name).unlink()
        lines = [line for line in lines if name not in line]
    (own / SUMS).write_text("".join(lines))
    with pytest.raises(DataError, match=r"is of another version \(it has no step\.onnx, readout\.onnx\): train again"):
        load_bundle(own)


@pytest.mark.parametrize("name", ["model", "step", "readout"])
def test_network_that_this_onnxruntime_cannot_read_is_refused(own: Path, name: str) -> None:
    model = onnx.load(own / f"{name}.onnx")
    model.opset_import[0].version = 9999
    (own / f"{name}.onnx").write_bytes(model.SerializeToString())
    sign(own)
    with pytest.raises(DataError, match="onnxruntime .* train again"):
        load_bundle(own)


@pytest.mark.parametrize(("name", "told"), [("model", "model.onnx"), ("readout", "step.onnx and readout.onnx")])
def test_network_that_answers_its_golden_windows_otherwise_is_refused(own: Path, name: str, told: str) -> None:
    """Output 5 (sell_q50) off by 2e-4 deviations: one more than the tolerance; half of it is let pass."""
    for off, refused in ((0.5e-4, False), (2e-4, True)):
        offsets = OFFSETS.copy()
        offsets[5] += np.float32(off)
        (own / f"{name}.onnx").write_bytes(graphs(network(offsets))[name])
        sign(own)
        if refused:
            with pytest.raises(DataError, match=rf"sell_q50 of its golden windows by {told} differs by 0\.0002 dev"):
                load_bundle(own)
        else:
            load_bundle(own)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("step", LinearNetwork(2, 2, np.ones((4, 8)), OF_BAR, OFFSETS), "cannot be computed as its task says"),
        ("step", LinearNetwork(3, 2, np.ones((5, 7)), OF_BAR, OFFSETS[:7]), "cannot be computed as its task says"),
        ("readout", network(of_bar=OF_BAR[1:]), "cannot be computed as its task says"),
        ("readout", LinearNetwork(3, 2, np.ones((5, 7)), OF_BAR, OFFSETS[:7]), "cannot be computed as its task says"),
        (
            "model",
            LinearNetwork(3, 2, np.ones((5, 7)), OF_BAR, OFFSETS[:7]),
            r"must answer \[3, 8\].* answers \[3, 7\]",
        ),
    ],
)
def test_networks_that_do_not_belong_together_are_refused(
    own: Path, name: str, other: LinearNetwork, message: str
) -> None:
    """Other variables, other units, another lookback, other columns."""
    (own / f"{name}.onnx").write_bytes(graphs(other)[name])
    sign(own)
    with pytest.raises(DataError, match=rf"{message}.*train again"):
        load_bundle(own)


def test_network_that_answers_nan_is_never_written(tmp_path: Path) -> None:
    broken = graphs(network(np.where(OFFSETS == 3, np.nan, OFFSETS).astype(np.float32)))
    with pytest.raises(DataError, match="buy_q90 of its golden windows .* differs by nan"):
        save_bundle(tmp_path / "a", parts(**broken))
    assert not list(tmp_path.iterdir())


# --- what is remembered ---------------------------------------------------------------------------------------------


def fresh() -> Bundle:
    made = parts()
    return Bundle(made.step, made.readout, made.task, made.scaler, made.reading, made.threshold)


def test_only_bars_that_are_new_are_computed() -> None:
    """Every step: windows as (symbol, first bar), and how many bars of them had not been there just before."""
    bundle = fresh()
    observed, known, _ = windows(3)
    history = {symbol: windows(5)[:2] for symbol in TASK.symbols}  # 30 bars of each: the same numbers for all three
    steps: list[tuple[list[tuple[str, int]], int]] = [
        ([("AUSDT", 0)], 6),
        ([("AUSDT", 0)], 0),
        ([("AUSDT", 1)], 1),
        ([("BUSDT", 1)], 6),  # the same numbers of another symbol
        ([("BUSDT", 2), ("AUSDT", 2)], 2),  # in another order
        ([("AUSDT", 5)], 3),
        ([("AUSDT", 4)], 1),  # backwards
        ([("AUSDT", 20)], 6),
        ([("AUSDT", 4)], 6),  # only the last window is remembered
        ([("CUSDT", 0), ("CUSDT", 1), ("CUSDT", 0)], 7),  # overlaps within a batch
        ([("CUSDT", 2)], 2),
        ([], 0),
    ]
    for wanted, new in steps:
        rows = [
            [array.reshape(30, -1)[first : first + LOOKBACK] for array in history[symbol]] for symbol, first in wanted
        ]
        observed = np.array([row[0] for row in rows]).reshape(-1, LOOKBACK, 3)
        known = np.array([row[1] for row in rows]).reshape(-1, LOOKBACK, 2)
        symbols = [symbol for symbol, _ in wanted]
        before = bundle.bars_embedded
        answers = bundle.predict(observed, known, symbols)
        assert bundle.bars_embedded - before == new, wanted
        np.testing.assert_allclose(
            np.column_stack(list(answers.values())), expected(observed, known, symbols), rtol=1e-6, atol=1e-5
        )


def test_one_bit_of_one_input_makes_a_bar_another_one() -> None:
    bundle = fresh()
    observed, known, symbols = windows(1)
    bundle.predict(observed, known, symbols)
    for array, column in ((observed, 0), (observed, 2), (known, 0)):
        array[0, 3, column] = np.nextafter(array[0, 3, column], np.float32(9), dtype=np.float32)
        before = bundle.bars_embedded
        bundle.predict(observed, known, symbols)
        assert bundle.bars_embedded - before == 1


Asked = list[tuple[int, int, int | None]]  # symbol, first bar, a bar of the window that was changed
ASKED = st.lists(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 12), st.none() | st.integers(0, LOOKBACK - 1)),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=6,
)


@budget(max_examples=60, deadline=None)
@drawn(ASKED, st.integers(0, 3))
def test_answers_do_not_depend_on_what_was_asked_before(batches: list[Asked], seed: int) -> None:
    """However windows repeat, move and change: as a fresh bundle answers, and one window of a symbol is kept."""
    bundle = fresh()
    observed, known = (array.reshape(18, -1) for array in windows(3, seed)[:2])
    for number, batch in enumerate(batches):
        given = [observed[first : first + LOOKBACK].copy() for _, first, _ in batch]
        for window, (_, _, changed) in zip(given, batch, strict=True):
            if changed is not None:
                window[changed] += 1 + number
        calendar = np.stack([known[first : first + LOOKBACK] for _, first, _ in batch])
        asked = (np.stack(given), calendar, [TASK.symbols[code] for code, *_ in batch])
        answers, alone = bundle.predict(*asked), fresh().predict(*asked)
        for name, unit in READING.units.items():
            np.testing.assert_allclose(answers[name], alone[name], rtol=1e-6, atol=1e-6 * unit)
            clear = np.abs(alone[name] - bundle.threshold) > 1e-5 * unit
            np.testing.assert_array_equal(
                (answers[name] > bundle.threshold)[clear], (alone[name] > bundle.threshold)[clear]
            )
        kept = bundle._embedder._remembered
        assert kept.keys() <= {0, 1, 2}
        assert all(len(keys) == len(answers) == LOOKBACK for keys, answers in kept.values())


def test_explain_answers_selection_and_attention_of_every_bar(bundle: Bundle) -> None:
    observed, known, symbols = windows(200, seed=4)
    selection, attention = bundle.explain(observed, known, symbols)
    scaled = SCALER.apply(np.concatenate([observed, known], axis=-1)).astype(float)
    code = np.array([TASK.symbols.index(symbol) for symbol in symbols])
    embedding = scaled[..., 1] + 2 * scaled[..., 4] + 10 * code[:, None]
    for found, logits in ((selection, scaled), (attention, embedding)):
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, weights / weights.sum(axis=-1, keepdims=True), rtol=1e-4, atol=1e-7)
    before = bundle.bars_embedded
    bundle.explain(observed[-1:], known[-1:], symbols[-1:])
    assert bundle.bars_embedded == before


def test_explain_refuses_what_predict_refuses(bundle: Bundle) -> None:
    observed, known, _ = windows(1)
    with pytest.raises(DataError, match="not trained on XUSDT"):
        bundle.explain(observed, known, ["XUSDT"])
    assert [part.shape for part in bundle.explain(observed[:0], known[:0], [])] == [(0, 6, 5), (0, 6)]


# --- in the runner --------------------------------------------------------------------------------------------------


def test_closed_bar_costs_one_step_of_each_symbol() -> None:
    """With the real indicators of as much history as the runner keeps: 59 inputs are the same, to the bit."""
    symbols = ("BTCUSDT", "ETHUSDT")
    made = momentum_parts(symbols, {})
    bundle = Bundle(made.step, made.readout, made.task, made.scaler, made.reading, made.threshold)
    forecaster, length, bars = bundle_forecaster(bundle, 0), history_bars(bundle), 6
    synthetic = SyntheticMarket(7, 0.1, to_ms(parse_time("2025-01-01T00:00Z")))
    candles = {symbol: synthetic.candles(symbol)[3000 : 3000 + length + bars] for symbol in symbols}
    alone = bundle_forecaster(Bundle(made.step, made.readout, made.task, made.scaler, made.reading, 0), 0)
    computed = []
    for bar in range(bars):
        seen = {symbol: series[bar : bar + length] for symbol, series in candles.items()}
        open_time_ms = int(seen["BTCUSDT"].open_time_ms[-1])
        before = bundle.bars_embedded
        (forecast,) = forecaster.forecast(seen, [(open_time_ms, symbols)])
        computed.append(bundle.bars_embedded - before)
        assert forecast.symbols == symbols
        change = [series.close[-1] / series.close[-5] - 1 for series in seen.values()]
        np.testing.assert_allclose(forecast.outputs["buy_mean"], 0.3 * np.array(change), rtol=1e-4, atol=1e-7)
    assert computed == [2 * made.task.lookback, *[2] * (bars - 1)]
    # A block of bars at once, as after a restart, gives the last forecast again.
    whole = {symbol: series[: bars - 1 + length] for symbol, series in candles.items()}
    times = whole["BTCUSDT"].open_time_ms[-bars:].tolist()
    again = alone.forecast(whole, [(time, symbols) for time in times])[-1]
    np.testing.assert_allclose(again.outputs["buy_mean"], forecast.outputs["buy_mean"], rtol=1e-6)


# --- nothing pickled, nothing heavy ---------------------------------------------------------------------------------


def test_bundle_holds_nothing_pickled(written: Path) -> None:
    with np.load(written / "golden.npz", allow_pickle=False) as golden:
        kinds = {name: golden[name].dtype.kind for name in golden.files}
    assert set(kinds) == {"observed", "known", "symbols", *TASK.outputs}
    assert set(kinds.values()) == {"f", "U"}


def test_pickle_in_the_golden_windows_is_not_unpacked(own: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "unpacked",)

    with np.load(own / "golden.npz") as golden:
        arrays: dict[str, Any] = {name: golden[name] for name in golden.files}
    arrays["observed"] = np.array([Trap()], dtype=object)
    np.savez(own / "golden.npz", **arrays)
    sign(own)
    with pytest.raises(DataError, match="train again"):
        load_bundle(own)
    assert not (tmp_path / "unpacked").exists()


def test_loading_and_predicting_needs_no_training_stack(written: Path) -> None:
    code = f"""
import sys, time, warnings
warnings.simplefilter("error")
import numpy as np
from perpcast.bundle import load_bundle
bundle = load_bundle({str(written)!r})
answers = bundle.predict(np.full((2, 6, 3), 1024.0), np.zeros((2, 6, 2)), ["AUSDT", "BUSDT"])
begun = time.process_time()
time.sleep(0.2)
idle = time.process_time() - begun
heavy = {{"tensorflow", "keras", "onnx", "tf2onnx", "matplotlib", "sqlalchemy", "pickle5"}} & set(sys.modules)
print(answers["buy_mean"].tolist(), sorted(heavy), idle < 0.02 or idle)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # level 0, hour_cos (0 + 1) / 2: 2 * 0.5 = 1, BUSDT 10 more; over all bars * 1.96875; * 0.5 + 0.25.
    # And no thread spins after the answer.
    assert run.stdout.strip() == "[1.234375, 11.078125] [] True", run.stderr


# --- written whole or not at all ------------------------------------------------------------------------------------


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["_write_json", "np.savez", "_sum_line", "load_bundle", "Bundle"])
def test_save_bundle_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Nothing at first, the older bundle afterwards; and the next attempt is not in the way of the failed one."""
    path = tmp_path / "a"
    for older in (None, 0.5):
        with monkeypatch.context() as patch:
            patch.setattr(f"perpcast.bundle.{broken}", fail)
            with pytest.raises(OSError, match="No space left"):
                save_bundle(path, parts())
        if older is None:
            assert not list(tmp_path.iterdir())
            save_bundle(path, parts(threshold=0.5))
        assert load_bundle(path).threshold == 0.5
        assert [each.name for each in tmp_path.iterdir()] == ["a"]
    save_bundle(path, parts(threshold=0.25))
    assert load_bundle(path).threshold == 0.25


def test_card_that_cannot_be_json_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_bundle(tmp_path / "a", parts(card={"mae": np.nan}))
    assert not list(tmp_path.iterdir())


def test_older_bundle_is_replaced_whole(own: Path) -> None:
    before = load_bundle(own).sha256
    (own / "left_over.txt").touch()
    (own / "card.md").write_text("damaged")
    (own.parent / f".{own.name}.part").mkdir()
    (own.parent / f".{own.name}.part" / "left_by_a_killed_run").touch()
    replaced = save_bundle(own, parts(threshold=0.75, golden=windows(2, seed=9)))
    assert {path.name for path in own.iterdir()} == {*FILES, SUMS}
    assert [path.name for path in own.parent.iterdir()] == [own.name]
    assert load_bundle(own).threshold == 0.75
    assert load_bundle(own).sha256 == replaced.sha256 != before


def test_save_bundle_ended_at_any_rename_leaves_a_whole_bundle_or_none(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for SIGKILL: from the n-th change of a folder on, the process does nothing any more."""

    class KilledError(BaseException):
        pass

    steps = 0
    limit = 0

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > limit:
                raise KilledError
            return function(*arguments, **options)

        return step

    killed = True
    while killed:
        steps, killed = 0, False
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", limited(Path.replace))
            patch.setattr(shutil, "rmtree", limited(shutil.rmtree))
            try:
                save_bundle(own, parts(threshold=limit + 0.5))
            except KilledError:
                killed = True
        if own.exists():
            assert load_bundle(own).threshold in (limit + 0.5, limit - 1 if limit else parts().threshold)
        save_bundle(own, parts(threshold=float(limit)))
        assert load_bundle(own).threshold == limit
        assert [path.name for path in own.parent.iterdir()] == [own.name]
        limit += 1
    assert limit > 4
