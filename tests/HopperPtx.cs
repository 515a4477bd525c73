using System.IO.Compression;
using System.Security.Cryptography;
using System.Text;
using MiniCpmNative.GpuEmulator.Driver;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// PTX of kernels_sm90a.cu for the emulator, where NVRTC 12 or newer is not to be had: a committed
/// file that NVRTC 13 made, whose first line holds the hash of what it was made of, or clang's. How
/// to make the file anew stands in tests/GpuEmulator/README.md.
/// </summary>
internal static class HopperPtx
{
    private static readonly ModuleOptions s_options =
        new(DType.BF16, 90, LineInfo: true) { Specific = true };

    public static string File { get; } =
        Path.Combine(ReferenceFile.Root, "ptx", "kernels_sm90a.ptx.gz");

    /// <summary>Of the source and of the shared numbers that it names.</summary>
    public static string Hash()
    {
        string source = CudaKernels.HopperSource;
        string[] named = [.. s_options.Arguments().Where(a =>
            a.StartsWith("-D", StringComparison.Ordinal) && source.Contains(a[2..a.IndexOf('=')]))];
        return Convert.ToHexStringLower(SHA256.HashData(
            Encoding.UTF8.GetBytes($"{string.Join(' ', named)}\n{source}")));
    }

    /// <summary>The committed file: the line with the hash, then PTX.</summary>
    public static string Read()
    {
        using FileStream file = System.IO.File.OpenRead(File);
        using var unpacked = new GZipStream(file, CompressionMode.Decompress);
        return new StreamReader(unpacked).ReadToEnd();
    }

    /// <summary>Makes the committed file by an NVRTC library.</summary>
    public static void Write(string library)
    {
        var search = new CudaSearch(
            name => name == CudaSearch.OverrideVariable ? Path.GetDirectoryName(library) : null,
            onlyOverride: true);
        var compiler = new ModuleCompiler(NvrtcApi.Load(search, 0), cache: null);
        byte[] ptx = compiler.Compile(CudaKernels.HopperSource, "kernels_sm90a.cu", s_options);
        using var packed = new MemoryStream();
        using (var gzip = new GZipStream(packed, CompressionLevel.SmallestSize, leaveOpen: true))
        {
            gzip.Write(Encoding.UTF8.GetBytes($"// of {Hash()}, by NVRTC {compiler.Version.Major}"
                + $".{compiler.Version.Minor}\n"));
            gzip.Write(ptx.AsSpan().TrimEnd((byte)0));
        }

        System.IO.File.WriteAllBytes(File, packed.ToArray());
    }

    /// <summary>The kernels as the emulator takes them; ignores the test where they cannot be
    /// had.</summary>
    public static CudaModule Load(CudaContext context, DeviceCompiler compiler)
    {
        byte[] ptx;
        if (compiler == DeviceCompiler.Nvrtc)
        {
            ptx = Encoding.UTF8.GetBytes(Read() + "\0");
        }
        else
        {
            if (ClangNvrtc.HopperClang is null)
                Assert.Ignore("clang 19 is not installed: tests/install-cuda-tools.sh installs it");
            ptx = new ModuleCompiler(ClangNvrtc.Table(), cache: null)
                .Compile(CudaKernels.HopperSource, "kernels_sm90a.cu", s_options);
        }

        return CudaModule.LoadPtx(context, ptx, CudaKernels.HopperSource, DType.BF16);
    }
}

/// <summary>The committed PTX is that of the source as it is.</summary>
[TestFixture]
public sealed class HopperPtxTests
{
    [Test]
    public void TheCommittedPtxIsOfThisSource()
    {
        if (Environment.GetEnvironmentVariable("CPMX_UPDATE_PTX") is { Length: > 0 } library)
            HopperPtx.Write(library);
        Assert.That(HopperPtx.Read(), Does.StartWith($"// of {HopperPtx.Hash()}, by NVRTC "),
            "kernels_sm90a.cu or a number it shares has changed: CPMX_UPDATE_PTX=LIBRARY of NVRTC "
            + "13 makes its PTX anew");
    }
}
