//! First inputs for each target, so that a run starts where it gets somewhere.

use std::fs;
use std::path::Path;

use crate::images::SEEDS;

/// Writes them into a folder for each target, under `folder`.
pub fn write_seeds(folder: &Path) {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = folder.join(target);
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(folder.join(name.replace(' ', "-")), bytes))
            .expect("a seed");
    };
    // Enough bytes to do something with, all the same in every run.
    let noise: Vec<u8> = (0..400u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    for (number, seed) in (0u8..).zip(SEEDS.iter()) {
        for target in ["open_read", "check_repair", "operate", "c_calls"] {
            let sound = [&[number, 0][..], &noise[usize::from(number)..]].concat();
            write(target, &format!("{} sound", seed.name), &sound);
            write(
                target,
                &format!("{} patched", seed.name),
                &[&[number, 3][..], &noise[usize::from(number)..]].concat(),
            );
        }
        for target in ["open_read", "check_repair"] {
            let whole = [&[u8::MAX][..], &seed.bytes[..seed.bytes.len().min(100 << 10)]].concat();
            write(target, &format!("{} whole", seed.name), &whole);
        }
        let first = &seed.bytes[..seed.bytes.len().min(4096)];
        for parser in [0, 6] {
            write("parsers", &format!("{} header {parser}", seed.name), &[&[parser][..], first].concat());
        }
        for area in &seed.areas[2..] {
            let bytes = &seed.bytes[area.clone()];
            let bits = seed.cluster.trailing_zeros() as u8 - 9;
            write("parsers", &format!("{} snapshots {}", seed.name, area.start), &[&[1][..], bytes].concat());
            let shape = [0, bits, 1, 4];
            write(
                "parsers",
                &format!("{} bitmaps {}", seed.name, area.start),
                &[&[2][..], &shape, &[2], bytes].concat(),
            );
            write("parsers", &format!("{} entries {}", seed.name, area.start), &[&[3][..], &shape, bytes].concat());
            write("parsers", &format!("{} counts {}", seed.name, area.start), &[&[4][..], &shape[..2], bytes].concat());
        }
        for method in [0, 1] {
            let packed = seed.bytes.chunks(512).find(|chunk| chunk.iter().filter(|&&b| b != 0).count() > 100);
            let packed = packed.unwrap_or(first);
            write("parsers", &format!("{} stored {method}", seed.name), &[&[5, method, 3][..], packed].concat());
        }
        write("options", seed.name, &noise[usize::from(number) * 9..]);
    }
}
