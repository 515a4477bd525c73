using System.Globalization;
using System.Text;
using System.Text.Json;
using YamlDotNet.Core;
using YamlDotNet.RepresentationModel;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// YAML configurations, turned into JSON: one reader behind them. Plain words are null, truth
/// values and numbers as YAML 1.2 has them (1e-5 too), everything else is text.
/// </summary>
internal static class YamlInput
{
    private const int MostBytes = 16 << 20, MostDepth = 32;

    public static bool Accepts(string path) =>
        Path.GetExtension(path).ToLowerInvariant() is ".yaml" or ".yml";

    /// <exception cref="InputException">Missing, no YAML, or no mapping of keys.</exception>
    public static JsonValue ReadObject(string path)
    {
        byte[] bytes = InputFile.ReadAll(path, MostBytes);
        var yaml = new YamlStream();
        try
        {
            yaml.Load(new StringReader(new UTF8Encoding(false, true).GetString(bytes)));
        }
        catch (YamlException failure)
        {
            throw new InputException($"{path}: is not valid YAML at line {failure.Start.Line}, "
                + $"column {failure.Start.Column}"
                + (failure.Message.Contains("uplicate", StringComparison.Ordinal)
                    ? " (a key is there twice)" : " (see its indentation, colons and "
                        + "quotes)"), failure);
        }
        catch (Exception failure)
        {
            throw new InputException(
                $"{path}: is not valid YAML in UTF-8", failure);
        }

        if (yaml.Documents is not [{ RootNode: YamlMappingNode root }])
            throw new InputException($"{path}: expected one YAML document of key: value lines");
        using var json = new MemoryStream();
        using (var writer = new Utf8JsonWriter(json)) Write(path, writer, root, 0);
        return JsonInput.Parse(path, json.ToArray());
    }

    private static void Write(string path, Utf8JsonWriter writer, YamlNode node, int depth)
    {
        // An alias may stand for much, and hold others.
        if (depth > MostDepth || writer.BytesCommitted + writer.BytesPending > MostBytes)
            throw new InputException($"{path}: is nested too deeply, or its aliases hold too much");
        switch (node)
        {
            case YamlMappingNode mapping:
                writer.WriteStartObject();
                foreach (var (key, value) in mapping.Children)
                {
                    if (key is not YamlScalarNode { Value: { } name })
                        throw new InputException(
                            $"{path}: line {key.Start.Line}: a key is no text");
                    writer.WritePropertyName(name);
                    Write(path, writer, value, depth + 1);
                }

                writer.WriteEndObject();
                break;
            case YamlSequenceNode items:
                writer.WriteStartArray();
                foreach (var item in items.Children) Write(path, writer, item, depth + 1);
                writer.WriteEndArray();
                break;
            default:
                Scalar(writer, (YamlScalarNode)node);
                break;
        }

        writer.Flush();
    }

    private static void Scalar(Utf8JsonWriter writer, YamlScalarNode scalar)
    {
        string text = scalar.Value ?? "";
        if (scalar.Style is not (ScalarStyle.Plain or ScalarStyle.Any))
            writer.WriteStringValue(text);
        else if (text is "" or "~" or "null" or "Null" or "NULL")
            writer.WriteNullValue();
        else if (text.ToLowerInvariant() is "true" or "false")
            writer.WriteBooleanValue(text[0] is 't' or 'T');
        else if (!char.IsAsciiLetter(text[^1]) && long.TryParse(text,
            NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long whole))
            writer.WriteNumberValue(whole);
        else if (!char.IsAsciiLetter(text[^1]) && double.TryParse(
            text, NumberStyles.Float, CultureInfo.InvariantCulture, out double number)
            && double.IsFinite(number))
            writer.WriteNumberValue(number);
        else writer.WriteStringValue(text);
    }
}
