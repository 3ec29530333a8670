#!/bin/sh
# Corrects the AMX of Bochs 3.0. Run in its source folder, before ./configure.
set -e

# TDPBSSD, TDPBSUD and TDPBUSD extend signed bytes by their sign (Intel SDM, volume 2).
sed -i 's/Bit32s(\([xy]\)byte/Bit32s((Bit8s)\1byte/g' cpu/avx/amx.cc

# XSAVE: tiles are in use when one was written; they have 16 rows; TILECFG holds bytes per row, then rows.
sed -i -e 's/tile_use_tracker == 0)/tile_use_tracker != 0)/' \
    -e 's/row < BX_TILE_REGISTERS/row < BX_TILE_MAX_ROWS/' \
    -e '/vmm16u(8+n) /s/\.rows;/.bytes_per_row;/' \
    -e '/vmmubyte(48+n) /s/\.bytes_per_row;/.rows;/' cpu/xsave.cc

# XFD (SDM, volume 1, 13.14), without which Linux offers no tiles: its CPUID bits, its two MSRs, and #NM on a tile
# instruction, except TILERELEASE, while tile data is disabled.
sed -i -e '/BX_ISA_XSAVES)/,/EBX/s/^\( *\)leaf->eax |= (1<<3);/&\n\1if (is_cpu_extension_supported(BX_ISA_AMX)) leaf->eax |= 1 << 4;/' \
    -e 's/^\( *\)leaf->ecx = (cpu->ia32_xss_suppmask.*/&\n\1if (subfunction == 18) leaf->ecx |= 1 << 2;/' cpu/cpuid.cc
sed -i -e '1,/^#define LOG_THIS/s/^#define LOG_THIS.*/&\nextern Bit64u ia32_xfd, ia32_xfd_err;/' \
    -e '/msr_desc\[BX_MSR_XSS\]/a msr_desc[BX_MSR_IA32_XFD] = new MSR_Descriptor("MSR_IA32_XFD", BX_ISA_AMX);\
msr_desc[BX_MSR_IA32_XFD_ERROR] = new MSR_Descriptor("MSR_IA32_XFD_ERR", BX_ISA_AMX);' \
    -e '/BX_CPU_C::rdmsr(/,/BX_CPU_C::wrmsr(/s/^ *case BX_MSR_XSS:/case BX_MSR_IA32_XFD: val64 = ia32_xfd; break;\
case BX_MSR_IA32_XFD_ERROR: val64 = ia32_xfd_err; break;\n&/' \
    -e '/BX_CPU_C::wrmsr(/,$s/^ *case BX_MSR_XSS:/case BX_MSR_IA32_XFD: ia32_xfd = val_64; handleAvxModeChange(); invalidate_prefetch_q(); break;\
case BX_MSR_IA32_XFD_ERROR: ia32_xfd_err = val_64; break;\n&/' cpu/msr.cc
sed -i -e '1,/^#define LOG_THIS/s/^#define LOG_THIS.*/&\nBit64u ia32_xfd = 0, ia32_xfd_err = 0;/' \
    -e '/BX_CPU_C::handleAvxModeChange/,/clear_amx_ok/s/BX_XCR0_XTILEDATA_MASK)) != 0)/& || (ia32_xfd \& BX_XCR0_XTILEDATA_MASK))/' \
    -e '/BX_CPU_C::handleAvxModeChange/,/clear_amx_ok/s/if (! long64_mode()/if ((! long64_mode()/' \
    -e '/BX_CPU_C::BxNoAMX/,/BX_ASSERT/s/^ *BX_ASSERT.*/  if (ia32_xfd \& BX_XCR0_XTILEDATA_MASK) {\
    if (i->getIaOpcode() == BX_IA_TILERELEASE) { TILERELEASE(i); return; }\
    ia32_xfd_err = BX_XCR0_XTILEDATA_MASK;\
    exception(BX_NM_EXCEPTION, 0);\
  }\n&/' cpu/proc_ctrl.cc
