//! Tests on the simulated disk, as one program: what the engine becomes over it is compiled once for all of them.

#[path = "../judge/mod.rs"]
mod judge;
#[path = "../pass_on/mod.rs"]
mod pass_on;
#[path = "../qemu/mod.rs"]
mod qemu;
#[path = "../requests/mod.rs"]
mod requests;
#[path = "../stage/mod.rs"]
mod stage;

mod ahead;
mod alphabet;
mod bitmap_crash;
mod campaign;
mod check_crash;
mod compressed;
mod crash;
mod create_crash;
mod decompressed;
mod faults;
mod interleave;
mod interleave_operations;
mod judge_self;
mod known_holes;
mod operation_crash;
mod operation_faults;
mod queue_faults;
mod regress_tables;
mod slices;
mod snapshot_crash;

/// What the environment sets a number to.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}
