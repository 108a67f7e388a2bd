"""What is read from machine code: lines as cuobjdump prints them, and a kernel that was compiled for it."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import kind_of, read_sass

SASS = """
	code for sm_90
		Function : first
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                  /* 0x00000a00ff017b82 */
                                                                                           /* 0x000e240000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;                        /* 0x0000000602048981 */
        /*0020*/                   LDG.E.U16.CONSTANT R5, desc[UR6][R2.64+0x40] ;          /* 0x0000400602057981 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR6][R10.64], !P1 ; /* 0x0a0a09fae2 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;     /* 0x00e00000085879f0 */
        /*0050*/                   MUFU.EX2 R3, R3 ;                                       /* 0x0000000300037308 */
        /*0060*/               @P2 BRA 0x30 ;                                              /* 0xfffffffc00b82947 */
        /*0070*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;                      /* 0x0e001f0004057f89 */
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                           /* 0x0000000000007b1d */
        /*0090*/                   BRA 0x70 ;                                              /* 0xfffffffc00fc7947 */
        /*00a0*/                   NOP ;                                                   /* 0x0000000000007918 */
		..........
		Function : second
        /*0000*/                   STL.64 [R1], R4 ;                                       /* 0x0000000401007387 */
        /*0010*/                   STG.E desc[UR4][R2.64], R5 ;                            /* 0x0000000502007986 */
        /*0020*/                   EXIT ;                                                  /* 0x000000000000794d */
"""


def test_lines_of_cuobjdump() -> None:
    first, second = read_sass(SASS).values()
    assert first.instructions == 10
    assert first.counts == {"HGMMA": 1, "LDG.128": 1, "LDG.16": 1, "LDGSTS.128": 1, "BAR": 1, "SHFL": 1, "MUFU.EX2": 1}
    assert first.loop_instructions == 4, "the loop that multiplies, not the one that waits"
    assert first.loop_counts == {"HGMMA": 1, "LDGSTS.128": 1, "MUFU.EX2": 1}
    assert str(first).endswith("; loop of 4: 1 HGMMA, 1 LDGSTS.128, 1 MUFU.EX2")
    assert second.counts == {"STG.32": 1, "STL": 1} and second.loop_counts is None
    with pytest.raises(ValueError, match="printed no function"):
        read_sass("cuobjdump fatal: no such file")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LDG.E.64", "LDG.64"), ("LDG.E.U8", "LDG.8"), ("STG.E.EF.128", "STG.128"), ("UTMALDG.2D", "UTMALDG"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "QGMMA"), ("FFMA", None), ("WARPGROUP.ARRIVE", None), ("LDGDEPBAR", None),
        ("MUFU.RSQ", "MUFU.RSQ"),
    ],
)  # fmt: skip
def test_what_is_counted(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
