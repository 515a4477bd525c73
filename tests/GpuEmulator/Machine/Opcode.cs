using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// An opcode's words after its stem. Builders take what they know; a word nobody took is an error
/// at load, so that no modifier is ever ignored.
/// </summary>
internal sealed class Opcode
{
    private readonly List<string> _words;

    public Opcode(string text)
    {
        _words = [.. text.Split('.')];
        Stem = _words[0];
        _words.RemoveAt(0);
    }

    public string Stem { get; }

    /// <summary>Removes the word when it is there.</summary>
    public bool Has(string word) => _words.Remove(word);

    /// <summary>Removes and returns whichever of the words is there, or "".</summary>
    public string Any(params ReadOnlySpan<string> words)
    {
        foreach (string word in words)
            if (_words.Remove(word)) return word;
        return "";
    }

    /// <summary>Removes cache hints, which change nothing here.</summary>
    public void DropHints() =>
        _words.RemoveAll(w => w is "ca" or "cg" or "cs" or "cv" or "lu" or "wb" or "wt"
            || w.StartsWith("L1::")
            || w.StartsWith("L2::"));

    /// <summary>Removes and returns the last word: the type.</summary>
    public string Last()
    {
        if (_words.Count == 0) throw new PtxException("the instruction's type is missing");
        string last = _words[^1];
        _words.RemoveAt(_words.Count - 1);
        return last;
    }

    /// <exception cref="PtxException">A modifier is left over.</exception>
    public void Finish()
    {
        if (_words.Count > 0)
            throw new PtxException($"modifier .{string.Join('.', _words)} is not known here");
    }

    public PtxException Unknown(string type) => new($"{Stem} of type .{type} is not known");
}
