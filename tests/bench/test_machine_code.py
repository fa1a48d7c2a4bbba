"""What is read from a listing, on one that was written by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.machine_code import Code, operations_of

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def code() -> Code:
    operations, loops = operations_of(LISTING)
    return Code(operations, loops, registers=8, spill_bytes=0)


def test_a_loop_inside_another_is_gone_through_in_each_trip() -> None:
    names = ["MOV", "LDG.E.64", "MUFU.EX2", "BRA", "STG.E.U16", "BRA", "EXIT", "BRA"]
    assert code().operations == names
    assert code().executions([3, 5]) == [1, 5, 15, 15, 5, 5, 1, 1]


def test_loops_whose_number_is_not_that_of_the_source_are_not_counted() -> None:
    assert code().executions([]) is None
    assert code().executions([3]) is None


def test_a_loop_that_is_unrolled_is_counted_as_it_stands() -> None:
    straight = Code(["LDG.E", "STG.E"], [], registers=8, spill_bytes=0)
    assert straight.executions([4]) == [1, 1]


def test_accesses_are_counted_by_their_width() -> None:
    assert code().accesses(("LDG",)) == {8: 1}
    assert code().accesses(("STG",)) == {2: 1}
