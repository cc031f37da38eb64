"""Image files and their labels before any file is opened: lists, tables, annotations and folders become a Listing.

A module reads each format; :func:`check` then looks for what all of them can get wrong.
"""

from longtail.data.listing.checks import check
from longtail.data.listing.folders import find_split_folders, names_by_folder, read_folder, validation_is_test
from longtail.data.listing.formats import (
    class_names_of_labels,
    encode_labels,
    read_annotations,
    read_list,
    read_splits,
)
from longtail.data.listing.tables import read_table
from longtail.data.listing.types import SPLITS, Entries, Listing, split_of

__all__ = [
    "SPLITS",
    "Entries",
    "Listing",
    "check",
    "class_names_of_labels",
    "encode_labels",
    "find_split_folders",
    "names_by_folder",
    "read_annotations",
    "read_folder",
    "read_list",
    "read_splits",
    "read_table",
    "split_of",
    "validation_is_test",
]
