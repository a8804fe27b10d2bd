//! Fuzz targets: bytes in, and rules that must hold whatever they are. A broken rule is a panic.
//!
//! ```text
//! bytes      takes numbers off the fuzzer's input
//! images     the seeds: sound small images of every kind, made by the library itself
//! subject    a seed with patches, or whole bytes, as the input says
//! disk       where a subject lives: counts calls, so that a hang is noticed, and changes
//! heap       counts memory
//! open_read check_repair operate parsers options c_calls      the targets
//! ```
//! Inputs that broke something are kept in `corpus/`, by target. See `README.md`.

mod bytes;
mod c_calls;
mod check_repair;
mod disk;
mod heap;
mod images;
mod open_read;
mod operate;
mod options;
mod parsers;
mod seeds;
mod subject;

pub use c_calls::c_calls;
pub use check_repair::check_repair;
pub use open_read::open_read;
pub use operate::operate;
pub use options::options;
pub use parsers::parsers;
pub use seeds::write_seeds;

#[global_allocator]
static HEAP: heap::Heap = heap::Heap;

/// Fails unless a rule holds.
#[macro_export]
macro_rules! rule {
    ($holds:expr, $($broken:tt)+) => {
        assert!($holds, "BROKEN RULE: {}", format_args!($($broken)+))
    };
}

/// Says what is done next, for who wants to know how an input gets where it gets: with QCOW2_FUZZ_TRACE set.
#[macro_export]
macro_rules! trace {
    ($($what:tt)+) => {
        if $crate::is_traced() {
            eprintln!("-- {}", format_args!($($what)+));
        }
    };
}

/// Whether [`trace!`] says anything.
pub fn is_traced() -> bool {
    static IS_TRACED: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| std::env::var_os("QCOW2_FUZZ_TRACE").is_some());
    *IS_TRACED
}
