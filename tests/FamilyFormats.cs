using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The row formats of the reference models of tests/reference/families, from their own tokenizer
/// files and configurations.
/// </summary>
internal static class FamilyFormats
{
    private static readonly Dictionary<string, RowFormat> s_formats = [];

    public static string Folder(string family) =>
        Path.Combine(ReferenceFile.Root, "families", family);

    /// <summary>The lines of a released chat template that write functions.</summary>
    public static string ToolTemplate(string family) =>
        ReferenceText.Json("templates/tool_texts.json").GetProperty(family).GetString()!;

    public static RowFormat Of(string family) => s_formats.TryGetValue(family, out var format)
        ? format : s_formats[family] = Make(family);

    /// <summary>The same over another folder's tokenizer.</summary>
    public static RowFormat Make(string family, string? folder = null)
    {
        folder ??= Folder(family);
        var tokenizer = Tokenizer.Load(folder);
        var config = ReferenceText.Json($"families/{family}.json");
        int queries = config.GetProperty("query_num").GetInt32();
        var slicing = config.TryGetProperty("slice_config", out var slices) ? slices : config;
        bool old = family is "v2" or "l3";
        return new RowFormat(
            family switch
            {
                "v2" => new MiniCpmFormat(tokenizer, folder),
                "l3" => new Llama3Format(tokenizer, folder),
                _ => ChatMlFormat.Load(folder, tokenizer),
            },
            old ? PlaceholderScheme.Old(tokenizer, RowFormats.Tokens, queries, folder)
                : PlaceholderScheme.New(tokenizer, RowFormats.Tokens, queries, folder),
            Numbered: true,
            new SlicingSpec(slicing.GetProperty("max_slice_nums").GetInt32(),
                slicing.GetProperty("scale_resolution").GetInt32(), 14),
            Slices: true, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5],
            config.GetProperty("vocab_size").GetInt32())
        {
            DocumentedLlmType = family == "v4" ? "llama" : null,
        };
    }

    /// <summary>
    /// The one row of a JSON object with "image" and "conversations", as the reader takes it.
    /// </summary>
    /// <exception cref="BadRowException">The reader refuses it.</exception>
    public static Row Row(JsonElement raw)
    {
        var set = RowFile.Parse("rows.json", Encoding.UTF8.GetBytes($"[{raw.GetRawText()}]"));
        return set.Rows is [var row] ? row : throw new BadRowException(set.Bad[0]);
    }

    public static SlicePlan Plan(JsonElement size, SlicingSpec slicing) => Slicer.Plan(
        new PictureSize(size[0].GetInt32(), size[1].GetInt32()), slicing.MaxSliceNums,
        slicing.ScaleResolution, slicing.PatchSize);

    /// <summary>The plan of one of V-2_6's pictures, which other references use too.</summary>
    public static SlicePlan SharedPlan(JsonElement picture) => Slicer.Plan(
        new PictureSize(picture.GetProperty("width").GetInt32(),
            picture.GetProperty("height").GetInt32()), 9, 448, 14);

    /// <summary>Width and height of every view, in model order.</summary>
    public static IEnumerable<PictureSize> Views(IEnumerable<SlicePlan> plans) =>
        plans.SelectMany(plan => Enumerable.Repeat(plan.Tile, plan.Views - 1)
            .Prepend(plan.Overview));

    /// <summary>Rows and columns of patches of every view, flat.</summary>
    public static IEnumerable<int> Grids(IEnumerable<SlicePlan> plans) =>
        Views(plans).SelectMany(view => (int[])[view.Height / 14, view.Width / 14]);

    public static void AssertBounds(ImageBound[] bounds, JsonElement expected, string name) =>
        Assert.That(bounds.SelectMany(b => (int[])[b.Start, b.End]), Is.EqualTo(
            expected.EnumerateArray().SelectMany(ReferenceText.Ints)), name);
}
