using System.Diagnostics;
using System.IO.Compression;
using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;
using MiniCpmNative.GpuEmulator.Driver;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// PTX of kernels_sm90a.cu for the emulator, where NVRTC 12 or newer is not to be had: a committed
/// file that NVRTC 13 made, or clang's. The file's first line holds the hash of what it was made
/// of, the next ones what ptxas says of each kernel. How to make it anew stands in
/// tests/GpuEmulator/README.md.
/// </summary>
internal static partial class HopperPtx
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

    /// <summary>The committed file: the lines told of above, then PTX.</summary>
    public static string Read()
    {
        using FileStream file = System.IO.File.OpenRead(File);
        using var unpacked = new GZipStream(file, CompressionMode.Decompress);
        return new StreamReader(unpacked).ReadToEnd();
    }

    /// <summary>Makes the committed file by an NVRTC library and the ptxas beside it.</summary>
    public static void Write(string library)
    {
        string folder = Path.GetDirectoryName(library)!;
        var search = new CudaSearch(
            name => name == CudaSearch.OverrideVariable ? folder : null,
            onlyOverride: true);
        var compiler = new ModuleCompiler(NvrtcApi.Load(search, 0), cache: null);
        byte[] ptx = compiler.Compile(CudaKernels.HopperSource, "kernels_sm90a.cu", s_options);
        using var packed = new MemoryStream();
        using (var gzip = new GZipStream(packed, CompressionLevel.SmallestSize, leaveOpen: true))
        {
            gzip.Write(Encoding.UTF8.GetBytes($"// of {Hash()}, by NVRTC {compiler.Version.Major}"
                + $".{compiler.Version.Minor}\n{Usage(Path.Combine(folder, "ptxas"), ptx)}"));
            gzip.Write(ptx.AsSpan().TrimEnd((byte)0));
        }

        System.IO.File.WriteAllBytes(File, packed.ToArray());
    }

    // "// NAME: N registers, N bytes of stack, N and N spilled" of each kernel.
    private static string Usage(string ptxas, byte[] ptx)
    {
        string file = Path.GetTempFileName();
        try
        {
            System.IO.File.WriteAllBytes(file, ptx[..^1]);
            var start = new ProcessStartInfo(ptxas, ["-arch=sm_90a", "-v", file, "-o", file])
            {
                RedirectStandardError = true,
            };
            using Process process = Process.Start(start)!;
            string report = process.StandardError.ReadToEnd();
            process.WaitForExit();
            Assert.That(process.ExitCode, Is.Zero, report);
            Assert.That(report, Does.Not.Contain("serialized"), "products wait for each other");
            return string.Concat(Report().Matches(report).Select(m =>
                $"// {m.Groups[1].Value}: {m.Groups[5].Value} registers, {m.Groups[2].Value} bytes "
                + $"of stack, {m.Groups[3].Value} and {m.Groups[4].Value} spilled\n")
                .Order(StringComparer.Ordinal));
        }
        finally
        {
            System.IO.File.Delete(file);
        }
    }

    [GeneratedRegex(
        @"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        + @"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers")]
    private static partial Regex Report();

    /// <summary>The kernels as the emulator takes them; ignores the test where they cannot be
    /// had. Another source than the committed one goes through clang.</summary>
    public static CudaModule Load(CudaContext context, DeviceCompiler compiler, string? source)
    {
        byte[] ptx;
        if (compiler == DeviceCompiler.Nvrtc && source is null)
        {
            ptx = Encoding.UTF8.GetBytes(Read() + "\0");
        }
        else
        {
            if (ClangNvrtc.HopperClang is null)
                Assert.Ignore("clang 19 is not installed: tests/install-cuda-tools.sh installs it");
            ptx = new ModuleCompiler(ClangNvrtc.Table(), cache: null)
                .Compile(source ?? CudaKernels.HopperSource, "kernels_sm90a.cu", s_options);
        }

        return CudaModule.LoadPtx(
            context, ptx, source ?? CudaKernels.HopperSource, DType.BF16);
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

    [Test]
    public void NothingSpills()
    {
        string[] lines = [.. HopperPtx.Read().Split('\n').Skip(1)
            .TakeWhile(line => line.StartsWith("// ", StringComparison.Ordinal)
                && line.Contains(" registers, ", StringComparison.Ordinal))];
        Assert.That(lines.Select(line => line[3..line.IndexOf(':')]), Is.EquivalentTo(
            KernelSignatures.Parse(CudaKernels.HopperSource, DType.BF16).Keys));
        Assert.That(lines, Has.All.EndWith(", 0 bytes of stack, 0 and 0 spilled"));
    }
}
