"""The download stage: what the database lacks of the wanted candles is fetched, checked and stored, stretch by stretch.

gaps   why bars are missing
run    one download: what to ask, asking, storing, writing down what is missing; verification; funding rates
"""

from perpcast.download.run import SETTLE_MS, DownloadSummary, Progress, Wanted, download

__all__ = ["SETTLE_MS", "DownloadSummary", "Progress", "Wanted", "download"]
