//! See the library: `open_read`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qcow2_fuzz::open_read(input));
