"""The published tables as data: one file per paper, each value with its cell's run."""

from nlhelpers.papers import chiaroni2019, ding2018, han2019, xiao2015
from nlhelpers.papers.table import Cell, Table

TABLES: dict[str, Table] = {
    "ding2018-table1": ding2018.TABLE1,
    "ding2018-table2": ding2018.TABLE2,
    "ding2018-table3": ding2018.TABLE3,
    "ding2018-table4": ding2018.TABLE4,
    "xiao2015-table2": xiao2015.TABLE2,
    "xiao2015-cifar10": xiao2015.CIFAR10,
    "han2019-table1": han2019.TABLE1,
    "han2019-table2": han2019.TABLE2,
    "han2019-table3": han2019.TABLE3,
    "han2019-table4": han2019.TABLE4,
    "han2019-table5": han2019.TABLE5,
    "chiaroni2019-table1": chiaroni2019.TABLE1,
}

__all__ = ["TABLES", "Cell", "Table"]
