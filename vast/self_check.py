"""Whether TensorFlow can train here: python -m vast.self_check --device gpu

A product on the device against numpy's, then a tiny compiled fit, as a training does it. One line names the device;
exit code 1 and the reason where it cannot.
"""

import os
import sys

import click


@click.command()
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True)
def main(device: str) -> None:
    """Check that TensorFlow computes on the device, and compiles for it.

    \b
    Example:
      python -m vast.self_check --device gpu
    """
    try:
        click.echo(f"self-check: {check(device)}")
    except Exception as error:  # whatever a driver, a library or a compiler may raise: the machine is of no use
        click.echo(f"error: TensorFlow cannot train on this machine's {device}: {error}", err=True)
        sys.exit(1)


def check(device: str) -> str:
    """What it is that computes. Raises what TensorFlow raises, RuntimeError where a result is wrong."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import numpy as np
    import tensorflow as tf

    found = tf.config.list_physical_devices(device.upper())
    if not found:
        raise RuntimeError(f"it sees none; it sees {[each.device_type for each in tf.config.list_physical_devices()]}")
    draw = np.random.default_rng(1)
    left, right = draw.normal(size=(256, 512)).astype(np.float32), draw.normal(size=(512, 128)).astype(np.float32)
    with tf.device(f"/{device.upper()}:0"):
        product = tf.linalg.matmul(left, right).numpy()
        # TensorFloat-32 keeps ten bits of a factor.
        if not np.allclose(product, left @ right, rtol=0, atol=0.5):
            raise RuntimeError("a matrix product is wrong")
        model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(8, activation="elu"), keras.layers.Dense(1)])
        model.compile(optimizer="adam", loss="mse", jit_compile=True)
        history = model.fit(left, left[:, 0], epochs=8, batch_size=64, verbose=0).history["loss"]
    if not history[-1] < history[0]:
        raise RuntimeError(f"a tiny fit does not learn: its loss went from {history[0]:.3f} to {history[-1]:.3f}")
    name = tf.config.experimental.get_device_details(found[0]).get("device_name", device.upper())
    return f"TensorFlow {tf.__version__} trains on {name}"


if __name__ == "__main__":
    main()
