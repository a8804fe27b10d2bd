//! Bytes of a cluster as they are stored: compression. Bounded by the cluster, whatever the stored bytes say.

use crate::error::{Error, Result};
use crate::format::Compression;

/// Why stored bytes could not be turned back into a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadData;

/// Decompresses one cluster. `stored` may be followed by bytes of other clusters: decompression stops when `cluster`
/// is full (spec, "Compressed Clusters Descriptor"), and it must become exactly full.
pub fn decompress(method: Compression, stored: &[u8], cluster: &mut [u8]) -> Result<std::result::Result<(), BadData>> {
    match method {
        Compression::Zlib => Ok(inflate(stored, cluster)),
        Compression::Zstd => unzstd(stored, cluster),
    }
}

/// Raw deflate without a zlib header. Any window is accepted; QEMU writes 12 bits.
fn inflate(stored: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadData> {
    let mut stream = zlib_rs::Inflate::new(false, 15);
    let status = stream.decompress(stored, cluster, zlib_rs::InflateFlush::Finish);
    if status.is_err() || stream.total_out() != cluster.len() as u64 { Err(BadData) } else { Ok(()) }
}

/// One or more frames, each decoded in one go, so that no window the frame asks for has to be allocated.
#[cfg(feature = "zstd")]
fn unzstd(mut stored: &[u8], cluster: &mut [u8]) -> Result<std::result::Result<(), BadData>> {
    let mut done = 0;
    while done < cluster.len() {
        let Ok(frame) = zstd_safe::find_frame_compressed_size(stored) else { return Ok(Err(BadData)) };
        let Some((frame, rest)) = stored.split_at_checked(frame) else { return Ok(Err(BadData)) };
        match zstd_safe::decompress(&mut cluster[done..], frame) {
            Ok(n) if n > 0 || !rest.is_empty() => done += n,
            _ => return Ok(Err(BadData)),
        }
        stored = rest;
    }
    Ok(Ok(()))
}

#[cfg(not(feature = "zstd"))]
fn unzstd(_: &[u8], _: &mut [u8]) -> Result<std::result::Result<(), BadData>> {
    Err(Error::Unsupported { feature: "zstd compression (this build of the library is without it)".into() })
}

/// Whether clusters compressed with `method` can be read by this build.
pub fn is_supported(method: Compression) -> bool {
    method == Compression::Zlib || cfg!(feature = "zstd")
}

/// Refuses a method that this build cannot read.
pub fn check_supported(method: Compression) -> Result<()> {
    if is_supported(method) {
        return Ok(());
    }
    Err(Error::Unsupported { feature: "zstd compression (this build of the library is without it)".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "stored" deflate block of 5 bytes: 01 05 00 fa ff "hello".
    const HELLO: &[u8] = &[1, 5, 0, 0xfa, 0xff, b'h', b'e', b'l', b'l', b'o', 0xaa, 0xbb];

    #[test]
    fn deflate_must_fill_the_cluster_exactly() {
        let mut cluster = [0; 5];
        assert_eq!(decompress(Compression::Zlib, HELLO, &mut cluster), Ok(Ok(())));
        assert_eq!(&cluster, b"hello");
        assert_eq!(decompress(Compression::Zlib, HELLO, &mut [0; 6]), Ok(Err(BadData)), "too little");
        assert_eq!(decompress(Compression::Zlib, &HELLO[..8], &mut [0; 5]), Ok(Err(BadData)), "cut off");
        assert_eq!(decompress(Compression::Zlib, &[7; 9], &mut [0; 5]), Ok(Err(BadData)), "garbage");
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn zstd_frames_are_joined_and_bounded() {
        let frame = |bytes: &[u8]| {
            let mut out = vec![0; 1000];
            let n = zstd_safe::compress(&mut out[..], bytes, 3).unwrap();
            out.truncate(n);
            out
        };
        let mut stored = frame(b"hel");
        stored.extend(frame(b"lo"));
        stored.extend([0xaa; 7]);
        let mut cluster = [0; 5];
        assert_eq!(decompress(Compression::Zstd, &stored, &mut cluster), Ok(Ok(())));
        assert_eq!(&cluster, b"hello");
        assert_eq!(decompress(Compression::Zstd, &stored, &mut [0; 6]), Ok(Err(BadData)));
        let bomb = frame(&[0; 100_000]);
        assert_eq!(decompress(Compression::Zstd, &bomb, &mut [0; 512]), Ok(Err(BadData)));
        assert_eq!(decompress(Compression::Zstd, &[], &mut [0; 512]), Ok(Err(BadData)));
    }
}
