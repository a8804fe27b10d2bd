//! See the library: `check_repair`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qcow2_fuzz::check_repair(input));
