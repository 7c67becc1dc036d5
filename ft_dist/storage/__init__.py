"""Named files in object stores and local folders. Only this package uses fsspec."""

from ft_dist.storage.storage import LOG_INTERVAL_S, Log, Storage, is_remote_folder, is_url, open_storage

__all__ = ["LOG_INTERVAL_S", "Log", "Storage", "is_remote_folder", "is_url", "open_storage"]
