using System.Text.RegularExpressions;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>What notices a planted mistake.</summary>
internal enum Finder
{
    /// <summary>A check of the emulated GPU; the plant says which.</summary>
    Emulator,

    /// <summary>The numeric rule of the operation's case.</summary>
    Rule,

    /// <summary>Another test, named by the plant.</summary>
    Test,
}

/// <summary>
/// One small mistake made in a function of kernels.cu by replacing a text that occurs there exactly
/// once, and the check that must find it when an operation's case,
/// or the test that Case names, runs.
/// </summary>
internal sealed record Plant(string Name, string Function, string From, string To, string Case)
{
    public Finder By { get; init; } = Finder.Rule;

    /// <summary>The emulator's finding, if that is what finds it.</summary>
    public Check Check { get; init; }

    /// <summary>The kernel its report names; the function itself if not given.</summary>
    public string? Kernel { get; init; }

    /// <summary>Size of the case's inputs.</summary>
    public int Size { get; init; } = 7;

    public DType Storage { get; init; } = DType.BF16;

    /// <summary>
    /// Sections of kernels.cu needed beside the first four and the function's own.
    /// </summary>
    public int[] With { get; init; } = [];

    /// <summary>A mistake that the emulator's check finds.</summary>
    public static Plant Fault(
        Check check, string name, string function, string from, string to, string @case) =>
        new(name, function, from, to, @case) { By = Finder.Emulator, Check = check };

    /// <summary>What runs in place of an operation's case.</summary>
    public Action<CudaUnderTest>? Other { get; init; }

    public OpCase Problem => OpCases.All.Single(c => c.Name == Case);

    /// <summary>kernels.cu as it is, but only the sections that the case needs.</summary>
    public string Sound => KernelText.Sections(CudaKernels.Source, Needed());

    /// <summary>The same with the mistake.</summary>
    public string Spoilt => KernelText.Sections(
        KernelText.Replace(CudaKernels.Source, Function, From, To), Needed());

    private int[] Needed() =>
        [1, 2, 3, 4, .. With, KernelText.SectionOf(CudaKernels.Source, Function)];
}

/// <summary>Finds and replaces in the text of kernels.cu.</summary>
internal static partial class KernelText
{
    /// <summary>Where the text of a function, or of a struct with functions, begins, and where it
    /// ends.</summary>
    public static (int Start, int End) Find(string source, string function)
    {
        Match[] found = Regex.Matches(source,
            $@"^(?:(?:extern|DEVICE|template|static)[^;{{}}]*?\b{function}\(|struct {function}$)", RegexOptions.Multiline)
                .ToArray();
        Assert.That(found, Has.Length.EqualTo(1), $"functions {function} in kernels.cu");
        int start = found[0].Index, brace = source.IndexOf('{', start);
        int line = source.IndexOf('\n', brace),
            end = source.IndexOf("\n}", brace, StringComparison.Ordinal);
        // A function of one line ends with it.
        return source[brace..line].Contains('}') ? (start, line) : (start, end + 2);
    }

    public static string Replace(string source, string function, string from, string to)
    {
        (int start, int end) = Find(source, function);
        string body = source[start..end];
        int count = Regex.Count(body, Regex.Escape(from));
        Assert.That(count, Is.EqualTo(1), $"places with \"{from}\" in {function} of kernels.cu");
        return source[..start] + body.Replace(from, to) + source[end..];
    }

    public static int SectionOf(string source, string function)
    {
        int start = Find(source, function).Start;
        return int.Parse(Header().Matches(source).Last(m => m.Index < start).Groups[1].Value);
    }

    /// <summary>
    /// Only these sections; the rest becomes empty lines, so that lines keep their numbers.
    /// </summary>
    public static string Sections(string source, int[] kept)
    {
        Match[] headers = Header().Matches(source).ToArray();
        var text = new System.Text.StringBuilder(source[..headers[0].Index]);
        for (int i = 0; i < headers.Length; i++)
        {
            int end = i + 1 < headers.Length ? headers[i + 1].Index : source.Length;
            string section = source[headers[i].Index..end];
            text.Append(kept.Contains(int.Parse(headers[i].Groups[1].Value))
                ? section
                : new string('\n', section.Count(c => c == '\n')));
        }

        return text.ToString();
    }

    [GeneratedRegex(@"^// ---- (\d+)\. ", RegexOptions.Multiline)]
    private static partial Regex Header();
}
