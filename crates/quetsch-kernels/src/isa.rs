//! Which instruction set runs, decided once. `QUETSCH_ISA` caps it.

#[cfg(target_arch = "x86_64")]
use crate::amx;
use std::sync::OnceLock;

/// Instruction sets that kernels are compiled for, in rising order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every CPU of this architecture has.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI, its 8-bit dot products.
    Avx512Vnni,
    /// AMX, tiles of int8 and bf16, above AVX512-VNNI.
    Amx,
}

impl Isa {
    /// The name that `QUETSCH_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Amx => "amx",
        }
    }

    /// The best that this CPU has and its operating system allows.
    pub fn best() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx512 && avx2 {
                if !is_x86_feature_detected!("avx512vnni") {
                    return Isa::Avx512;
                }
                return if amx::state() == amx::State::Ready { Isa::Amx } else { Isa::Avx512Vnni };
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Scalar
    }

    /// What `QUETSCH_ISA` asks for, else the best.
    ///
    /// # Errors
    /// An unknown name, or an instruction set that this CPU does not have.
    pub fn from_env() -> Result<Isa, String> {
        let best = Isa::best();
        let Some(name) = std::env::var_os("QUETSCH_ISA").filter(|v| !v.is_empty()) else {
            return Ok(best);
        };
        let all = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Amx];
        match all.into_iter().find(|i| name.to_str() == Some(i.name())) {
            Some(i) if i <= best => Ok(i),
            Some(Isa::Amx) if amx_fault().is_some() => Ok(best),
            Some(i) => Err(format!("QUETSCH_ISA={}: this CPU has {} at best", i.name(), best.name())),
            None => {
                Err(format!("QUETSCH_ISA={}: expected scalar, avx2, avx512, avx512vnni or amx", name.display()))
            }
        }
    }
}

/// The instruction set in use. A bad `QUETSCH_ISA` is reported by [`Isa::from_env`] at the program's door; here it
/// falls back to what every CPU has.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| Isa::from_env().unwrap_or(Isa::Scalar))
}

/// Whether `vdpbf16ps` (AVX512-BF16) is there and not capped away.
pub fn bf16_dot() -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa() >= Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether products of bf16 run faster here than those of f32. `vdpbf16ps` has twice the rate of f32 FMA on AMD
/// (Zen 4 and 5), and half of it on Intel, where AMX has many times the rate.
pub fn bf16_is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // Every product asks, and a virtual machine takes microseconds to answer `cpuid`.
        static FAST: OnceLock<bool> = OnceLock::new();
        *FAST.get_or_init(|| {
            let vendor = std::arch::x86_64::__cpuid(0);
            let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            isa() == Isa::Amx || bf16_dot() && name.as_flattened() == b"AuthenticAMD"
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Why a CPU with AMX does not use it: the operating system denied it, or its products were wrong.
pub fn amx_fault() -> Option<String> {
    #[cfg(target_arch = "x86_64")]
    match amx::state() {
        amx::State::Denied(errno) => {
            return Some(format!("the operating system denies AMX to this process (arch_prctl: error {errno})"));
        }
        amx::State::Wrong(what) => return Some(format!("AMX is not used: its {what} product failed the trial")),
        amx::State::Absent | amx::State::Ready => {}
    }
    None
}

/// Compiles a plain function for every instruction set and picks one at run time.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    plain($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    plain($($arg),*)
                }
                match $crate::isa::isa() {
                    $crate::isa::Isa::Scalar => {}
                    // SAFETY: `isa()` is at most `Isa::best()`, which saw these features on this CPU.
                    $crate::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above; what stands higher has AVX-512 too.
                    _ => return unsafe { avx512($($arg),*) },
                }
            }
            plain($($arg),*)
        }
    };
}
