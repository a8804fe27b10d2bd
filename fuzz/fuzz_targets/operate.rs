//! See the library: `operate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qcow2_fuzz::operate(input));
