//! No target: writes the first inputs of all of them into the folder that `QCOW2_FUZZ_SEEDS` names.
#![no_main]
#![allow(unreachable_code, reason = "the macro goes on after an exit")]

libfuzzer_sys::fuzz_target!(
    init: {
        let folder = std::env::var_os("QCOW2_FUZZ_SEEDS").expect("QCOW2_FUZZ_SEEDS names a folder");
        qcow2_fuzz::write_seeds(folder.as_ref());
        std::process::exit(0);
    },
    |_input: &[u8]| {}
);
