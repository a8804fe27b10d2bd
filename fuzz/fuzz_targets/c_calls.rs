//! See the library: `c_calls`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qcow2_fuzz::c_calls(input));
