//! See the library: `options`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qcow2_fuzz::options(input));
